from .inference import InferenceSettings as InferenceSettings
from .inference import answer as answer
from .inference import predict as predict
from .inspection import inspect_question as inspect_question
from .run import EvalSettings as EvalSettings
from .run import evaluate as evaluate
from .scores import official_scores as official_scores
