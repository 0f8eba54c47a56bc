"""Engines, each in a module that imports its library only when it is asked for."""
