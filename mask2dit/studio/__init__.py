"""The studio: a page on which stories are written, generated and mended scene by scene."""
