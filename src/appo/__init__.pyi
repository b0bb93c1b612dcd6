from .data import load_dataset as load_dataset
from .method.perception import token_weights as token_weights
from .models.families import use_pretrained_positions as use_pretrained_positions
from .models.log_probs import score_group as score_group
from .models.prompt import Prompt as Prompt
from .training.config import APPOConfig as APPOConfig
from .training.trainer import APPOTrainer as APPOTrainer
from .types import FrameSpans as FrameSpans
from .types import Group as Group
from .types import GroupScores as GroupScores
from .types import PerceptionWeights as PerceptionWeights
from .types import Sample as Sample
from .types import VideoError as VideoError
from .types import VideoQA as VideoQA
from .types import VideoSource as VideoSource

__version__: str
