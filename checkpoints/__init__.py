"""Files of networks: reading them safely, saying what they hold, and opening them."""
