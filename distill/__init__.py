"""distill: how close does a student come to a teacher that it may only query, and which defense stops it?"""

__version__ = "0.1.0"
