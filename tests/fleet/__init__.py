"""What a fleet of processes costs a peer that fails, with shared circuits and without.

python -m tests.fleet simulate             # 5,000 processes on a simulated clock; the plots
python -m tests.fleet measure              # 200 real processes on this machine
python -m tests.fleet redis                # what a Redis in trouble costs a connect
"""
