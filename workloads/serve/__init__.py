"""The Ray Serve application for one model: it follows a channel and answers in OpenAI's format."""
