"""The planner [Table 1, §3, §4.2]: parameters, FLOPs, memory, communication, time and cost of a run, before it exists."""
