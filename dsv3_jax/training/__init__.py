"""Objective, optimiser, schedules, step, and the loop around it [§4.2]."""
