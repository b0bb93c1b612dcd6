from .jsonl import RecordError as RecordError
from .page import page_data as page_data
from .page import write_page as write_page
from .records import ResponseRecord as ResponseRecord
from .records import RolloutRecord as RolloutRecord
from .run_folder import LoadedRun as LoadedRun
from .run_folder import RunFolder as RunFolder
from .run_folder import load_run as load_run
