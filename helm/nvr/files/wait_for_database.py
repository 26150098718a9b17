"""Before a service of Airflow starts: wait until its database answers, for as many seconds as the argument says.

`airflow db check` would do it, too, at the price of one more interpreter full of Airflow per pod.
"""

import os
import sys
import time

import sqlalchemy

deadline = time.monotonic() + float(sys.argv[1])
engine = sqlalchemy.create_engine(os.environ["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"], poolclass=sqlalchemy.NullPool)
told = ""
while True:
    try:
        engine.connect().close()
        break
    except sqlalchemy.exc.OperationalError as error:
        why = f"the database does not answer: {error.orig}".strip()  # of the driver, which names no password
    if time.monotonic() > deadline:
        sys.exit(f"{why}\nGiven up: check the key `connection` of Airflow's Secret, and that the database runs.")
    if why != told:
        sys.stderr.write(f"{why}\nWaiting for it …\n")
        told = why
    time.sleep(2)
