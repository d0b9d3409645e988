"""The studio itself: what the web and the workers share. No torch here, and no web outside `web/`."""
