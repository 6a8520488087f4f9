"""Pictures and videos: from where their bytes are to RGB, safely."""
