"""One algorithm on any mesh [§3.1, §3.2]: the mesh, its rules, expert parallelism and pipeline schedules."""
