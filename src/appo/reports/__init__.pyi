from .jsonl import RecordError as RecordError
from .page import page_data as page_data
from .page import write_page as write_page
from .run_folder import ResponseRecord as ResponseRecord
from .run_folder import RolloutRecord as RolloutRecord
from .run_folder import RunFolder as RunFolder
from .seen_run import SeenRun as SeenRun
from .seen_run import see_run as see_run
