package server

import (
	"cmp"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/feed"
	"github.com/entente-mesh/entente/ca/presence"
	"github.com/entente-mesh/entente/ca/wire"
	"github.com/entente-mesh/entente/federation/catalog"
)

// Bounds on what one member may say.
const (
	// completeTimeout is how long its full set may take.
	completeTimeout = 30 * time.Second
	// maxRow bounds the bytes of an instance, maxSession those of a session with its proof.
	maxRow     = 1 << 10
	maxSession = 4 << 10
	// maxUnknown is how many rows its full set may have beyond those that the agreed state
	// here allows: this node may lag.
	maxUnknown = 20_000
	// maxAside bounds the bytes of rows that are kept to be looked at again.
	maxAside = 8 << 20
)

// Hearsay takes what one other member says of its sessions: what may be true by the agreed
// state, as it is checked when an agent reports here, and each session for as much as its
// subscriber's signature makes it worth. The two nodes' states are not equally far: what
// is not known here is kept aside, and looked at again (Again).
type Hearsay struct {
	server *Server
	member string

	mu       sync.Mutex
	complete bool
	rows     int // of the full set until it is complete, those that are left out included
	mostRows int // that it may have, as far as was looked
	said     map[string]*statement
	order    []string // of said
	unknown  int      // bytes of rows in said that the state does not know
	aside    map[string]*statement
	asideSum int // bytes in aside
	verified map[string]verifiedSession
}

// statement is what the member says of one subscriber.
type statement struct {
	session *ententev1.Instance
	rows    []*ententev1.Instance
	size    int // bytes of both
}

// verifiedSession spares verifying the same signature with each change of a health.
type verifiedSession struct {
	version presence.Version
	proof   presence.Proof
	keyID   string
	err     error
}

// Hear begins to hear a member; one for each stream.
func (s *Server) Hear(member string) *Hearsay {
	return &Hearsay{server: s, member: member, said: map[string]*statement{}, aside: map[string]*statement{}, verified: map[string]verifiedSession{}}
}

// take takes one chunk, and hands on what it says once the full set is complete.
func (h *Hearsay) take(now time.Time, chunk *ententev1.PresenceResponse) (complete bool, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.server.State.Read(func(st *domain.State) {
		if !h.complete {
			err = h.bound(st, len(chunk.GetInstances())+len(chunk.GetWithdrawn()))
		}
		if err == nil {
			h.read(st, chunk)
		}
	})
	if err != nil {
		return false, err
	}
	full := chunk.GetComplete()
	if h.complete = h.complete || full; !h.complete {
		return false, nil
	}
	in := feed.Instances{Complete: full}
	for _, gone := range chunk.GetWithdrawn() {
		in.Withdrawn = append(in.Withdrawn, presence.Instance{Endpoint: catalog.Endpoint{Agent: gone.GetAgent()}})
		h.forget(gone.GetAgent())
		delete(h.verified, gone.GetAgent())
	}
	h.hand(now, in)
	return true, nil
}

// bound refuses a full set with more rows than agreed agents can have: each has a session,
// and each entry of its host some instances or, of a gateway or edge, a session.
func (h *Hearsay) bound(st *domain.State, more int) error {
	if h.rows += more; h.rows <= h.mostRows {
		return nil
	}
	h.mostRows = maxUnknown
	for agent := range st.Agents() {
		h.mostRows += 1 + presence.MaxInstancesOfService*st.EntryCountOnHost(agent.GetName())
	}
	if h.rows > h.mostRows {
		return fmt.Errorf("its sessions have over %d rows, more than the agents of this domain can have", h.mostRows)
	}
	return nil
}

// read gathers a chunk by subscriber. A statement begins with the session itself, its
// instances follow by service and id. Of what the agreed state does not know here, a bounded
// number of bytes is kept.
func (h *Hearsay) read(st *domain.State, chunk *ententev1.PresenceResponse) {
	for _, row := range chunk.GetInstances() {
		name := row.GetAgent()
		agent, known := host(st, name)
		said, size := h.said[name], proto.Size(row)
		switch {
		case row.GetService() == "":
			if row.GetBootId() == "" || len(row.GetBootId()) > maxBootID || size > maxSession {
				continue
			}
		case size > maxRow:
			continue
		case said == nil || len(said.rows) >= presence.MaxInstancesPerAgent:
			continue
		default:
			if n := len(said.rows); n > 0 && cmp.Or(cmp.Compare(row.GetService(), said.rows[n-1].GetService()), cmp.Compare(row.GetId(), said.rows[n-1].GetId())) <= 0 {
				continue
			}
			known = known && mayServe(st, agent, row) == nil
		}
		if !known {
			if h.unknown+size > maxAside {
				continue
			}
			h.unknown += size
		}
		if row.GetService() != "" {
			said.rows, said.size = append(said.rows, row), said.size+size
			continue
		}
		if said == nil {
			h.order = append(h.order, name)
		}
		h.said[name] = &statement{session: row, size: size}
	}
}

// hand hands on what was gathered.
func (h *Hearsay) hand(now time.Time, in feed.Instances) {
	h.server.State.Read(func(st *domain.State) {
		for _, name := range h.order {
			said := h.said[name]
			if said == nil {
				continue
			}
			h.forget(name)
			upserts, whole := h.check(st, name, said)
			in.Upserts = append(in.Upserts, upserts...)
			if !whole && h.asideSum+said.size <= maxAside {
				h.aside[name], h.asideSum = said, h.asideSum+said.size
			}
		}
	})
	h.said, h.order, h.unknown = map[string]*statement{}, nil, 0
	if len(in.Upserts)+len(in.Withdrawn) > 0 || in.Complete {
		h.server.Feed.Remote(now, h.member, in)
	}
}

// Again looks at what was kept aside, for this node's state may know it now.
func (h *Hearsay) Again(now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.complete || len(h.aside) == 0 {
		return
	}
	for name, said := range h.aside {
		h.said[name] = said
		h.order = append(h.order, name)
	}
	h.hand(now, feed.Instances{})
}

func (h *Hearsay) forget(name string) {
	if said := h.aside[name]; said != nil {
		h.asideSum -= said.size
		delete(h.aside, name)
	}
}

// check returns what of a statement may be true by the agreed state here; whole: all of it.
func (h *Hearsay) check(st *domain.State, name string, said *statement) (rows []presence.Instance, whole bool) {
	agent, ok := host(st, name)
	if !ok {
		return nil, false
	}
	session := wire.ToInstance(said.session)
	session.Proof, session.Worth = presence.Proof{}, presence.Unproven
	whole = true
	if proof := said.session.GetProof(); proof != nil {
		var err error
		session.Worth, err = h.worth(st, name, agent, session.Version, proof)
		whole = !errors.Is(err, errOtherKey) // it may be a key that is agreed and not known here yet
	}
	rows = append(rows, session)
	for _, r := range said.rows {
		if strings.Contains(name, "@") || r.GetBootId() != session.Version.BootID || r.GetConnect() != session.Version.Connect {
			continue
		}
		if mayServe(st, agent, r) != nil {
			whole = false
			continue
		}
		instance := wire.ToInstance(r)
		instance.Datacenter, instance.Stale = agent.GetDatacenter(), session.Stale
		rows = append(rows, instance)
	}
	return rows, whole
}

// host is the agent of a subscriber that may be one by the agreed state: an agent, a
// gateway or an edge.
func host(st *domain.State, subscriber string) (*statev1.Agent, bool) {
	entry, name, workload := strings.Cut(subscriber, "@")
	if !workload {
		return st.Agent(subscriber)
	}
	agent, ok := st.Agent(name)
	e, found := st.Entry(entry)
	return agent, ok && found && ca.Entitled(agent, e) && st.MaySync(e)
}

var errOtherKey = errors.New("the session is signed by another key than the agent's")

// worth verifies a session's proof as this node's door would, but for the node that is
// named: the one that says it.
func (h *Hearsay) worth(st *domain.State, name string, agent *statev1.Agent, v presence.Version, proof *ententev1.SessionProof) (presence.Worth, error) {
	was := h.verified[name]
	given := presence.Proof{PublicKey: string(proof.GetPublicKey()), Signature: string(proof.GetSignature())}
	if was.version != v || was.proof != given {
		session := ca.Session{Cluster: st.Cluster().GetId(), Subscriber: name, BootID: v.BootID, Connect: v.Connect, NodeID: h.member}
		was = verifiedSession{version: v, proof: given}
		was.keyID, was.err = session.Verify(proof.GetPublicKey(), proof.GetSignature())
		h.verified[name] = was
	}
	if was.err != nil {
		return presence.Unproven, was.err
	}
	switch {
	case strings.Contains(name, "@"):
		return presence.Claimed, nil
	case was.keyID != agent.GetKeyId():
		return presence.Unproven, errOtherKey
	}
	return presence.Proven, nil
}
