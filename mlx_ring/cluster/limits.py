"""The time limits by which ranks, agents, the supervisor and probes watch over one another, in one table.

All are in seconds. Each line says what the limit is on, and who waits. `hosts/host_probe.py` has two of its
own, because its text is sent to hosts by itself.
"""

# Signs of life
PULSE_SECONDS = 0.5  # between two reports of a rank to its agent, and of an agent to the supervisor
PING_SECONDS = 2.0  # between two pings of the supervisor to an agent, which renew the agent's lease
LEASE_SECONDS = 12.0  # a rank without its agent, or an agent without orders, lives on for this long at most
RANK_SILENT_SECONDS = 5.0  # the supervisor suspects a rank that its agent has not heard for longer
AGENT_SILENT_SECONDS = 3.0  # an agent that was silent for longer is started anew before the next attempt
HOST_SILENT_SECONDS = 10.0  # an attempt fails when a host's agent is silent for longer, or does not answer

# The start
AGENT_READY_SECONDS = 20.0  # the supervisor waits for an agent's first report: ssh and Python start first
MEET_SECONDS = 120.0  # the supervisor waits for all ranks to come to the start
START_SECONDS = 600.0  # without progress while ranks read data, restore, compile the first step, or save
EFFORT_SECONDS = 2.0  # over which the supervisor judges whether a rank that tells nothing is at work

# Watching
TICK_SECONDS = 0.5  # an attempt waits for a report before it looks at the clock again
SETTLE_SECONDS = 1.0  # after the first bad exit an attempt waits for others, to tell the cause from witnesses
DUMP_SECONDS = 1.0  # an attempt waits for the stacks of ranks that hang
PROCESS_POLL_SECONDS = 0.05  # between two looks of an agent at whether a process has ended

# The end of processes
SAME_SIGNAL_SECONDS = 2.0  # the same signal again within this time belongs to the same request to stop
GRACE_SECONDS = 5.0  # an agent waits between SIGTERM and SIGKILL; while ranks save it is LEASE_SECONDS
ALL_ENDED_SECONDS = GRACE_SECONDS + 2.0  # an attempt waits for its agents to have ended all ranks
LAST_OUTPUT_SECONDS = 1.0  # an agent reads the output of an ended process: a grandchild may hold it open
LAST_REPORT_SECONDS = 1.0  # an agent waits for the last report of a rank whose process has ended
LINK_CLOSE_SECONDS = 1.0  # the supervisor waits for an agent to end by itself
LAST_COMPLAINTS_SECONDS = 1.0  # for the stderr of an ended process: what ssh left may hold it open
CONSOLE_CLOSE_SECONDS = 2.0  # the supervisor waits for its last lines to be printed

# Restarts
BACK_OFF_SECONDS = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # before the first, second, … further try
SCOUT_SECONDS = 5.0  # between two looks for hosts that came back, and into the host file
HOST_LOST_SECONDS = 5.0  # a host that has just been lost is not asked; a restart does not wait for it
OFTEN_SECONDS = 600.0  # the time over which the failures of one host are counted
SET_ASIDE_SECONDS = 60.0  # a host that keeps failing is left out; each further time twice as long

# Probes
PROBE_READY_SECONDS = 30.0  # for a probe's first word: ssh and a cold Python start first
PROBE_ANSWER_SECONDS = 60.0  # for a probe's answer, for which it may load MLX for the first time
LINK_MEASURE_SECONDS = 0.3  # a probe sends as fast as it can, to measure one connection

# A rank that starts or ends
MISTAKE_MEETING_SECONDS = 10.0  # a rank with a mistake waits for the others before it reports it alone
# MLX's ring holds the interpreter while it connects. A thread that sees that the time is up may be late: the
# connection may exist by then. So it waits this much longer.
RING_CONNECT_GRACE_SECONDS = 5.0
DIRECTORY_LOCK_SECONDS = LEASE_SECONDS + 8.0  # a rank that lost its supervisor holds its directory meanwhile

# The doctor
DATA_SECONDS = 600.0  # without progress while a host opens the data of a run
LAUNCH_SECONDS = 180.0  # a trial launch of ranks, from its start to its end

# Sweeps
SWEEP_HOSTS_SECONDS = 60.0  # a sweep waits for hosts to answer if no running job could free some
SWEEP_RETRY_SECONDS = 5.0  # between two attempts of a sweep to reach them
JOB_HOSTS_SECONDS = 20  # a job waits for its lost hosts at each restart
JOB_LOOK_SECONDS = 1.0  # between two looks at a job's evaluations
RECORD_FETCH_SECONDS = 600.0  # for the record of one job: a host that hangs must not hold up the sweep
