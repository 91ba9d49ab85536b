"""A new session of an agent whose tunnels exist, in one statement instead of nine.

Two functions: code before this step does not know them. Each statement inside has its own snapshot, which is why they are
functions: what a key stands for is read after the key is held. A later change of one is another function with another name, so
that processes of the version before go on.
"""

from __future__ import annotations

from alembic import op

revision = "0021"
down_revision = "0020"

FUNCTIONS = (
    # Digest of all that decides what a key may do, and of what an answer says of its account; null when there is no such key.
    """
CREATE FUNCTION key_mark(p_key text) RETURNS text LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN (
        SELECT encode(sha256(convert_to(ROW(
            k.kind, k.scopes, k.allowed_cidrs, k.expires_at, k.revoked_at, k.user_id, u.email, u.disabled_at,
            u.email_verified_at, m.role, r.permissions, o.id, o.name, o.suspended_at, o.delete_after, o.plan, o.plan_version,
            o.edge_version, (
                SELECT array_agg(ROW(v.name, v.value)::text ORDER BY v.name) FROM plan_overrides v
                WHERE v.organization_id = o.id AND (v.expires_at IS NULL OR v.expires_at > now())
            )
        )::text, 'UTF8')), 'hex')
        FROM api_keys k JOIN organizations o ON o.id = k.organization_id
        LEFT JOIN users u ON u.id = k.user_id
        LEFT JOIN members m ON m.user_id = k.user_id AND m.organization_id = k.organization_id
        LEFT JOIN roles r ON r.id = m.role AND r.organization_id = k.organization_id
        WHERE k.id = p_key
    );
END $$
""",
    # A new session with tunnels that exist and are as asked for: one row for each, or none, and nothing is written, when
    # that is not so, when the key does not stand for what the caller saw (p_mark), when the instance has a session, or when
    # more than p_online tunnels would be on line. Locks in the order of all: the key, the set, the session, the tunnels.
    # Raises serialization_failure when a tunnel is stopped or deleted at this moment.
    """
CREATE FUNCTION start_agent_session(
    p_session text, p_organization text, p_key text, p_mark text, p_agent text, p_hostname text, p_version text,
    p_region text, p_address text, p_life float8, p_online bigint, p_lease float8,
    p_names text[], p_protocols text[], p_subdomains text[], p_ports int[], p_targets text[], p_events text[]
) RETURNS TABLE (
    id text, name text, protocol text, subdomain text, policy text, policy_hash text, policy_version bigint,
    generation bigint, port int
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    found_ids text[];
    bound_rows bigint;
BEGIN
    PERFORM FROM api_keys k WHERE k.id = p_key FOR SHARE;
    IF key_mark(p_key) IS DISTINCT FROM p_mark THEN
        RETURN;
    END IF;
    IF p_online IS NOT NULL THEN
        PERFORM pg_advisory_xact_lock(hashtextextended('tunnels of ' || p_organization, 0));
    END IF;
    SELECT array_agg(t.id ORDER BY w.place) INTO found_ids
    FROM unnest(p_names, p_protocols, p_subdomains, p_ports, p_targets)
        WITH ORDINALITY AS w (name, protocol, subdomain, port, target, place)
    JOIN tunnels t ON t.organization_id = p_organization AND t.name = w.name
    WHERE t.state = 'active' AND t.frozen IS NULL AND t.protocol = w.protocol
      AND (w.subdomain IS NULL OR w.subdomain = t.subdomain) AND (w.port IS NULL OR w.port = t.port)
      AND (w.target IS NULL OR w.target = t.target);
    IF cardinality(found_ids) IS DISTINCT FROM cardinality(p_names) THEN
        RETURN;
    END IF;
    IF p_online IS NOT NULL AND cardinality(found_ids) + (
        SELECT count(DISTINCT n.tunnel_id)
        FROM agent_sessions s JOIN agent_session_tunnels n ON n.session_id = s.id
        WHERE s.organization_id = p_organization AND s.ended_at IS NULL AND s.expires_at > now()
          AND NOT n.tunnel_id = ANY(found_ids)
          AND (s.updated_at > now() - make_interval(secs => p_lease) OR EXISTS (
              SELECT FROM relay_bindings b JOIN relays r ON r.name = b.relay
              WHERE b.tunnel_id = n.tunnel_id AND b.session_id = s.id
                AND r.seen_at > now() - make_interval(secs => p_lease)))
    ) > p_online THEN
        RETURN;
    END IF;
    INSERT INTO agent_sessions
        (id, organization_id, key_id, agent_id, hostname, version, region, expires_at, address)
    VALUES (p_session, p_organization, p_key, p_agent, p_hostname, p_version, p_region,
            now() + make_interval(secs => p_life), p_address)
    ON CONFLICT (key_id, agent_id) WHERE ended_at IS NULL DO NOTHING;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    RETURN QUERY
    WITH wanted AS (
        SELECT t.*, w.place::int - 1 AS position, w.event
        FROM unnest(found_ids, p_events) WITH ORDINALITY AS w (id, event, place) JOIN tunnels t ON t.id = w.id
        WHERE t.state = 'active' AND t.frozen IS NULL
        ORDER BY t.id FOR KEY SHARE OF t
    ), bound AS (
        INSERT INTO agent_session_tunnels (session_id, tunnel_id, position) SELECT p_session, id, position FROM wanted
    ), told AS (
        INSERT INTO tunnel_events (id, tunnel_id, kind, details)
        SELECT event, id, 'session', jsonb_build_object('session', p_session) FROM wanted
    )
    SELECT t.id, t.name, t.protocol, t.subdomain, t.policy::text, t.policy_hash, t.policy_version, t.generation, t.port
    FROM wanted t ORDER BY t.position;
    GET DIAGNOSTICS bound_rows = ROW_COUNT;
    IF bound_rows <> cardinality(found_ids) THEN
        RAISE EXCEPTION 'a tunnel of the session is gone' USING ERRCODE = 'serialization_failure';
    END IF;
END $$
""",
)


def upgrade() -> None:
    """Make the functions."""
    for statement in FUNCTIONS:
        op.execute(statement)
