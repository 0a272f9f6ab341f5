"""An experiment as one HTML file."""
