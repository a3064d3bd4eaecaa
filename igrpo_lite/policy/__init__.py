import logging

# Before anything here imports PEFT, and that bitsandbytes, which says each time that an optional kernel is missing.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
