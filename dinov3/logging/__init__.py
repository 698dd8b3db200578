"""What a run tells about itself.

`setup.py`: log lines and files. `helpers.py`: metrics, smoothed and logged while a loop runs. `sinks.py`: where records
of metrics go. `rows.py`: files in which each iteration stands once. `progress.py`: a bar on a terminal.
"""

from dinov3.logging.helpers import MetricLogger, SmoothedValue
from dinov3.logging.setup import cleanup_logging, setup_logging

__all__ = ["MetricLogger", "SmoothedValue", "cleanup_logging", "setup_logging"]
