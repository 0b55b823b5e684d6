"""Machines, and the processes on them. Nothing here computes, and nothing here loads MLX.

- `hosts`: which machines there are, how they are reached, and what they look like from here.
- `rank`: what a rank's process knows of its place, and what it says to those who watch over it.
- `agent`: the process on each host that starts ranks there, watches them and ends them.
- `supervisor`: `mlx-ring run`; it starts agents, decides who is to blame, and restarts.
- `doctor`: `mlx-ring doctor`; it looks at hosts, links and ranks before a run does.
- `finding`: one result of a check, which the doctor and the commands print.
- `limits`: all time limits by which these watch over one another.

This room knows a run only by its processes, its heartbeats and its directory.
"""

__all__: list[str] = []  # import the rooms inside by name
