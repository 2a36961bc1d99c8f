# shellcheck shell=bash disable=SC2154 # grace is set before
end_run "$grace"
echo "$(hostname): ended with $(cat run.exit 2>/dev/null || echo 'no run')"
