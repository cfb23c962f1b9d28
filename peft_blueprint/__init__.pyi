from .blueprint import Blueprint as Blueprint
from .blueprint import Submodule as Submodule
from .compare import check_drift as check_drift
from .compare import reconcile as reconcile
from .data import Selection as Selection
from .data import select_examples as select_examples
from .errors import BlueprintError as BlueprintError
from .measure import Influence as Influence
from .measure import Privacy as Privacy
from .measure import generate_blueprint as generate_blueprint
from .measure import measure_influence as measure_influence
from .place import BlueprintConfig as BlueprintConfig
from .place import Placement as Placement
from .place import Workload as Workload
from .place import plan_placement as plan_placement
from .publish import export_uniform_lora as export_uniform_lora
from .runs import MarginalReturn as MarginalReturn
from .train import LedgerCallback as LedgerCallback
from .train import initialize_along_gradient as initialize_along_gradient
from .train import share_base as share_base

__version__: str
