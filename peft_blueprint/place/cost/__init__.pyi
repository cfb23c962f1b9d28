from .model import FLOPS_PER_BYTE as FLOPS_PER_BYTE
from .model import Cost as Cost
from .model import CostModel as CostModel
from .structure import Structure as Structure
from .workload import Workload as Workload
from .workload import workload_of as workload_of
