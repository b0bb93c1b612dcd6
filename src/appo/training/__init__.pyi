from .arguments import TrainScript as TrainScript
from .config import APPOConfig as APPOConfig
from .rollout_logger import Recorder as Recorder
from .run import make_trainer as make_trainer
from .run import train as train
from .sft import make_sft_trainer as make_sft_trainer
from .trainer import APPOTrainer as APPOTrainer
