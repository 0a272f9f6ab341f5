"""Configs as the user wrote them: files and options laid over one another, and where in them a mistake is."""
