"""How NVR's stages become Airflow tasks: the only code here that knows operators.

A DAG file needs `settings`, `params` and `workflow`.
"""
