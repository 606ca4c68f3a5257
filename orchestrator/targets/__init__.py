"""Where attempts execute. ``base`` holds the protocol; each other module is the only caller of its system."""
