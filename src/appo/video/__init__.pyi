from .decode_worker import Decoder as Decoder
from .frame_cache import FrameCache as FrameCache
from .frame_cache import cache_in as cache_in
from .frame_sampling import FrameSampling as FrameSampling
from .frame_sampling import SampledVideo as SampledVideo
from .reader import read_video as read_video
from .thumbnails import filmstrip as filmstrip
