"""Files and folders that a user names: what may be read, and images as they are meant to be seen."""
