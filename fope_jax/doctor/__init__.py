"""`fope doctor`: checks that a run is sound, and repairs it.

`examine` changes nothing and continues after each finding; only `repair` changes files.
"""

from fope_jax.doctor.checks import as_json as as_json
from fope_jax.doctor.checks import as_text as as_text
from fope_jax.doctor.checks import examine as examine
from fope_jax.doctor.checks import exit_code as exit_code
from fope_jax.doctor.progress import read_progress as read_progress
from fope_jax.doctor.repairs import repair as repair
