from .families import (
    Family as Family,
)
from .families import (
    family_of as family_of,
)
from .families import (
    has_family as has_family,
)
from .families import (
    use_pretrained_positions as use_pretrained_positions,
)
from .loading import load_model as load_model
from .log_probs import log_probs_at as log_probs_at
from .log_probs import score_group as score_group
from .prompt import Prompt as Prompt
from .vision_tower import freeze_vision_tower as freeze_vision_tower
