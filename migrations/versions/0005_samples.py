"""Samples of what a run answers while it learns; fingerprints of base models."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "sample",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("place", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_sample_run_id")),
        sa.PrimaryKeyConstraint("run_id", "step", "place", name=op.f("pk_sample")),
    )
    op.add_column("base_model", sa.Column("fingerprint", sa.Text(), nullable=True))
    # Rows that are there already need a value; new ones get theirs from the program.
    watch = sa.Column("watch", sa.JSON(none_as_null=True), nullable=False, server_default="[]")
    op.add_column("experiment", watch)
    with op.batch_alter_table("experiment") as batch:
        batch.alter_column("watch", server_default=None)


def downgrade() -> None:
    with op.batch_alter_table("experiment") as batch:
        batch.drop_column("watch")
    with op.batch_alter_table("base_model") as batch:
        batch.drop_column("fingerprint")
    op.drop_table("sample")
