"""The periods that both ends of the wire know, in seconds."""

# Every engine registers with the directory this often.
BEAT_SECONDS = 1.0
