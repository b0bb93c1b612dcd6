from .dataset import generate as generate
from .dataset import load_annotations as load_annotations
from .dataset import planned as planned
from .policy import load_policy as load_policy
from .policy import policy_path as policy_path
from .world import LEVELS as LEVELS
