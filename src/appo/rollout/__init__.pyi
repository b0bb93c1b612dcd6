from .encoding import PromptEncoder as PromptEncoder
from .generation import (
    VideoCache as VideoCache,
)
from .generation import (
    encode_prompt as encode_prompt,
)
from .generation import (
    generate as generate,
)
from .generation import (
    respond as respond,
)
from .pipeline import RolloutPipeline as RolloutPipeline
from .pipeline import RolloutSettings as RolloutSettings
