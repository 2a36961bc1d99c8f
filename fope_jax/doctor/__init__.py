"""Is a run sound, and what is to be done where it is not: `fope doctor`.

`examine` looks at everything, changes nothing, and goes on after each finding. `repair` is a
second, explicit step.
"""

from fope_jax.doctor.checks import as_json as as_json
from fope_jax.doctor.checks import as_text as as_text
from fope_jax.doctor.checks import examine as examine
from fope_jax.doctor.checks import exit_code as exit_code
from fope_jax.doctor.repairs import repair as repair
