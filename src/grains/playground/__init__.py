"""A page in the browser: attribution, steering and its strength, on a prompt of one's own."""
