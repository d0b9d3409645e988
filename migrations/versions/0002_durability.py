"""Checkpoints, notices, choices, forecasts, the trash."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

TRASH = ("dataset", "base_model", "experiment", "run")


def upgrade() -> None:
    op.create_table(
        "checkpoint",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_checkpoint_run_id")),
        sa.PrimaryKeyConstraint("run_id", "step", "attempt", name=op.f("pk_checkpoint")),
    )
    op.create_table(
        "notice",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("next_at", sa.Double(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_notice_run_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_notice")),
    )
    op.create_index(op.f("ix_notice_run_id"), "notice", ["run_id"])
    op.create_index(op.f("ix_notice_state"), "notice", ["state"])
    op.create_table(
        "choice",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("value", sa.JSON(none_as_null=True), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_choice")),
    )
    for table in TRASH:
        op.add_column(table, sa.Column("trashed_at", sa.Double(), nullable=True))
    # Rows that are there already need a value; new ones get theirs from the program.
    op.add_column("run", sa.Column("forecast", sa.JSON(), nullable=False, server_default="{}"))
    op.add_column("worker", sa.Column("num_devices", sa.Integer(), nullable=False, server_default="1"))
    with op.batch_alter_table("run") as batch:
        batch.alter_column("forecast", server_default=None)
    with op.batch_alter_table("worker") as batch:
        batch.alter_column("num_devices", server_default=None)
    with op.batch_alter_table("point") as batch:
        batch.alter_column("tokens", type_=sa.BigInteger(), existing_nullable=False)


def downgrade() -> None:
    with op.batch_alter_table("point") as batch:
        batch.alter_column("tokens", type_=sa.Integer(), existing_nullable=False)
    with op.batch_alter_table("worker") as batch:
        batch.drop_column("num_devices")
    with op.batch_alter_table("run") as batch:
        batch.drop_column("forecast")
    for table in TRASH:
        with op.batch_alter_table(table) as batch:
            batch.drop_column("trashed_at")
    for table in ("choice", "notice", "checkpoint"):
        op.drop_table(table)
