package evil

import (
	"bytes"
	"context"
	"crypto/x509"
	"fmt"
	"maps"
	"math"
	"slices"

	"google.golang.org/grpc/credentials"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/federation/bundle"
)

// Lie is one thing that a node says and that is not so.
type Lie struct {
	Name    string
	Attacks string // the promise that it breaks if it is believed

	// Sync returns what one subscriber hears in the place of each message, which the lie
	// may change and keep. It is called once for each stream.
	Sync func(m *Member, subscriber string) func(*ententev1.SyncResponse) []*ententev1.SyncResponse
	// Heard changes what a subscriber says, before the real node hears it.
	Heard func(*ententev1.SyncRequest)
	// Presence is what each other member hears ten times a second beside the truth.
	Presence func(m *Member) *ententev1.PresenceResponse
	// Deaf is a method of the API that the node does not carry out.
	Deaf string
}

// Revisions that a subscriber goes to and does not come back from by itself, since its
// revision never falls.
const (
	FarAhead  = 1 << 43   // in the middle of this epoch
	NextEpoch = 1 << 44   // as if a recovery had been
	LastEpoch = 511 << 44 // beyond every recovery to come, for a cluster of the first epoch
)

// OwnRoot: an authority of the attacker's is in the domain's bundle. It attacks "who is
// verified by the bundle was admitted by the domain" (I1): with it, every name is forged.
func OwnRoot() Lie {
	return Lie{
		Name: "own-root", Attacks: "only agreed authorities are in a subscriber's bundle",
		Sync: func(m *Member, _ string) func(*ententev1.SyncResponse) []*ententev1.SyncResponse {
			return func(r *ententev1.SyncResponse) []*ententev1.SyncResponse {
				for _, b := range r.GetPolicy().GetBundles() {
					if b.GetTrustDomain() == m.Root.TrustDomain().Name() {
						b.Jwks = m.withRoot(b.GetJwks())
					}
				}
				return one(r)
			}
		},
	}
}

func (m *Member) withRoot(jwks []byte) []byte {
	own, _, err := bundle.Parse(m.Root.TrustDomain(), jwks)
	if err != nil {
		return jwks
	}
	own.X509 = append(own.X509, m.Root.Cert)
	own.Sequence += 1 << 43 // the newest that there is
	forged, err := own.Marshal()
	if err != nil {
		return jwks
	}
	return forged
}

// Ahead: the state is by so many revisions newer than it is. It attacks "what is agreed
// reaches every subscriber": what honest nodes say afterwards is old, and passed over.
func Ahead(by uint64) Lie {
	return Lie{
		Name: fmt.Sprintf("ahead-%x", by), Attacks: "no revision captures a subscriber",
		Sync: func(*Member, string) func(*ententev1.SyncResponse) []*ententev1.SyncResponse {
			return func(r *ententev1.SyncResponse) []*ententev1.SyncResponse {
				switch m := r.GetMessage().(type) {
				case *ententev1.SyncResponse_Policy:
					if m.Policy.GetRevision() != 0 {
						m.Policy.Revision += by
					}
				case *ententev1.SyncResponse_Heartbeat:
					m.Heartbeat.Revision += by
				}
				return one(r)
			}
		},
		Heard: func(r *ententev1.SyncRequest) {
			switch m := r.GetMessage().(type) {
			case *ententev1.SyncRequest_Hello:
				m.Hello.ResumeRevision = 0 // the whole state, whatever it has seen
			case *ententev1.SyncRequest_Ack:
				m.Ack.Revision = less(m.Ack.GetRevision(), by)
			}
		},
	}
}

// OldEpoch: the node goes on after a recovery has ended its epoch. It attacks "one epoch
// at a time": who is not asked elsewhere never hears of the recovery.
func OldEpoch() Lie {
	return Lie{Name: "old-epoch", Attacks: "a recovery reaches every subscriber", Deaf: ententev1.Peer_ShowEpoch_FullMethodName}
}

func less(revision, by uint64) uint64 {
	if revision > by {
		return revision - by
	}
	return 0
}

// Alone: the cluster has no member but this one. It attacks "a subscriber finds an honest
// node again": it knows no other address, and takes the others for strangers.
func Alone() Lie {
	return Lie{
		Name: "alone", Attacks: "a subscriber that reaches honest nodes hears them",
		Sync: func(m *Member, _ string) func(*ententev1.SyncResponse) []*ententev1.SyncResponse {
			return func(r *ententev1.SyncResponse) []*ententev1.SyncResponse {
				if p := r.GetPolicy(); p.GetMembersChanged() {
					p.Members = slices.DeleteFunc(p.Members, func(o *statev1.Member) bool { return o.GetId() != m.ID })
				}
				return one(r)
			}
		},
		Heard: wholeState,
	}
}

// MadeUpEntry: an entry that nobody made is among a subscriber's, at the revision that was
// agreed. It attacks "a removed node is forgotten": entries are not compared, and what the
// next node tells of changes does not take it away.
func MadeUpEntry(e *statev1.Entry) Lie {
	return Lie{
		Name: "made-up-entry", Attacks: "what a node made up goes with it",
		Sync: func(*Member, string) func(*ententev1.SyncResponse) []*ententev1.SyncResponse {
			return func(r *ententev1.SyncResponse) []*ententev1.SyncResponse {
				if p := r.GetPolicy(); p.GetLast() {
					p.Entries = append(p.Entries, e)
				}
				return one(r)
			}
		},
	}
}

// OtherItems: each distrust item has the id of a real one, and names nobody. It attacks "what
// is revoked is known everywhere in time" where items are told apart by their ids.
func OtherItems() Lie {
	rename := func(items []*statev1.Distrust) {
		for _, d := range items {
			if d.GetAgent() != "" {
				d.Agent = "nobody"
			}
		}
	}
	return Lie{
		Name: "other-items", Attacks: "what is revoked is known everywhere in time",
		Sync: func(*Member, string) func(*ententev1.SyncResponse) []*ententev1.SyncResponse {
			return func(r *ententev1.SyncResponse) []*ententev1.SyncResponse {
				rename(r.GetPolicy().GetDistrust())
				rename(r.GetUrgent().GetDistrust())
				return one(r)
			}
		},
	}
}

// wholeState has a subscriber hear everything anew from a node that has just begun to lie.
func wholeState(r *ententev1.SyncRequest) {
	if hello := r.GetHello(); hello != nil {
		hello.ResumeRevision = 0
	}
}

// HiddenRevocations: everything new is told but what takes rights away: distrust, taints,
// entries, relationships and authorities that are gone. It attacks "a revocation reaches
// every subscriber" (I4).
func HiddenRevocations() Lie {
	return Lie{
		Name: "hidden-revocations", Attacks: "what is revoked is known everywhere in time",
		Sync: func(m *Member, _ string) func(*ententev1.SyncResponse) []*ententev1.SyncResponse {
			return func(r *ententev1.SyncResponse) []*ententev1.SyncResponse {
				if r.GetUrgent() != nil {
					return nil
				}
				if p := r.GetPolicy(); p != nil {
					p.Distrust, p.DeletedEntries, p.DeletedObjects, p.DeletedBundles = nil, nil, nil, nil
					p.Tainted, p.TaintedChanged = nil, false
					for _, b := range p.GetBundles() {
						if b.GetTrustDomain() == m.Root.TrustDomain().Name() {
							b.Jwks = m.firstBundle(b.GetJwks())
						}
					}
				}
				return one(r)
			}
		},
	}
}

func (m *Member) firstBundle(now []byte) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.bundle == nil {
		m.bundle = bytes.Clone(now)
	}
	return m.bundle
}

// OldPicture: nothing has changed since the subscriber first asked. What it heard then is
// replayed to it at each connect, at the revision of then, with a heartbeat of now. It
// attacks the same as HiddenRevocations, without a word that is false.
func OldPicture() Lie {
	return Lie{
		Name: "old-picture", Attacks: "what is agreed reaches a subscriber in time",
		Sync: func(m *Member, subscriber string) func(*ententev1.SyncResponse) []*ententev1.SyncResponse {
			var replay []*ententev1.SyncResponse
			m.mu.Lock()
			if first := m.pictures[subscriber]; len(first) > 0 && first[len(first)-1].GetPolicy().GetLast() {
				replay = slices.Clone(first)
			} else {
				delete(m.pictures, subscriber)
			}
			m.mu.Unlock()
			return func(r *ententev1.SyncResponse) []*ententev1.SyncResponse {
				m.mu.Lock()
				defer m.mu.Unlock()
				first := m.pictures[subscriber]
				whole := len(first) > 0 && first[len(first)-1].GetPolicy().GetLast()
				switch of := r.GetMessage().(type) {
				case *ententev1.SyncResponse_Policy:
					if !whole && len(first) == 0 && !of.Policy.GetFull() {
						return nil // a stream of before: it stays where it is
					}
					if !whole {
						m.pictures[subscriber] = append(first, proto.CloneOf(r))
						return one(r)
					}
					said := replay
					replay = nil
					return said
				case *ententev1.SyncResponse_Urgent:
					return nil
				case *ententev1.SyncResponse_Heartbeat:
					if whole {
						of.Heartbeat.Revision = first[len(first)-1].GetPolicy().GetRevision()
					}
				}
				return one(r)
			}
		},
		Heard: wholeState,
	}
}

// Replayed: what a subscriber heard is said again behind each news, old after new. It
// attacks "a revision never goes back".
func Replayed() Lie {
	return Lie{
		Name: "replayed", Attacks: "an old state does not replace a newer one",
		Sync: func(*Member, string) func(*ententev1.SyncResponse) []*ententev1.SyncResponse {
			var before []*ententev1.SyncResponse
			return func(r *ententev1.SyncResponse) []*ententev1.SyncResponse {
				if r.GetPolicy() == nil {
					return one(r)
				}
				said := append(one(r), before...)
				if len(before) < 64 {
					before = append(before, proto.CloneOf(r))
				}
				return said
			}
		},
		Heard: wholeState,
	}
}

// Selectors: an entry has other selectors than agreed, at the revision that was agreed.
// It attacks "an SVID goes to the process that the entry names": an agent of an honest
// signer would hand the key to another.
func Selectors(entry string, selectors ...string) Lie {
	return Lie{
		Name: "selectors", Attacks: "what one node says of an entry gives nobody an SVID that another node signs",
		Sync: func(*Member, string) func(*ententev1.SyncResponse) []*ententev1.SyncResponse {
			return func(r *ententev1.SyncResponse) []*ententev1.SyncResponse {
				for _, e := range r.GetPolicy().GetEntries() {
					if e.GetId() == entry {
						e.Selectors = selectors
					}
				}
				return one(r)
			}
		},
		Heard: wholeState,
	}
}

// LaterConnects: every agent and gateway that others hold a stream of has connected here,
// later than any of its connects. It attacks "a subscriber's stream lasts" and the ready
// gate (I3): the others end their streams, and count nobody's acknowledgement.
func LaterConnects() Lie {
	return Lie{
		Name: "later-connects", Attacks: "one node's claim ends no stream and clears nobody",
		Presence: func(m *Member) *ententev1.PresenceResponse {
			said := &ententev1.PresenceResponse{}
			for name, boot := range m.Sessions() {
				said.Instances = append(said.Instances, &ententev1.Instance{Agent: name, BootId: boot, Connect: math.MaxUint64})
			}
			return said
		},
	}
}

// FalseInstances: a service is served at an address of the attacker's, by every agent that
// is known. Subscribers here hear it, and other members, who pass it on. It attacks "an
// endpoint is where its agent says": it can cost requests, and gives no identity.
func FalseInstances(service, address string) Lie {
	claims := func(m *Member, datacenter string) (list []*ententev1.Instance) {
		sessions := m.Sessions()
		for _, name := range slices.Sorted(maps.Keys(sessions)) {
			list = append(list, &ententev1.Instance{
				Service: service, Agent: name, Datacenter: datacenter, Address: address,
				Health: ententev1.Health_HEALTH_HEALTHY, BootId: sessions[name], Connect: math.MaxUint64,
			})
		}
		return list
	}
	return Lie{
		Name: "false-instances", Attacks: "presence is the word of each agent on itself",
		Sync: func(m *Member, _ string) func(*ententev1.SyncResponse) []*ententev1.SyncResponse {
			return func(r *ententev1.SyncResponse) []*ententev1.SyncResponse {
				if p := r.GetPresence(); p != nil {
					p.Instances = append(p.Instances, claims(m, m.Record().GetDatacenter())...)
				}
				return one(r)
			}
		},
		Presence: func(m *Member) *ententev1.PresenceResponse {
			return &ententev1.PresenceResponse{Instances: claims(m, m.Record().GetDatacenter())}
		},
	}
}

// Flood: so many instances of agents that nobody agreed to, in each message to another
// member, new ones each time. It attacks the bounds of what a member may have others hold.
func Flood(instances int) Lie {
	return Lie{
		Name: "flood", Attacks: "a member costs the others bounded memory",
		Presence: func(m *Member) *ententev1.PresenceResponse {
			m.mu.Lock()
			m.flooded++
			round := m.flooded
			m.mu.Unlock()
			said := &ententev1.PresenceResponse{}
			for i := range instances {
				said.Instances = append(said.Instances, &ententev1.Instance{
					Service: "flood", Agent: fmt.Sprintf("nobody-%d-%d", round, i), Datacenter: "dc1", Address: "127.0.0.1:1",
					Health: ententev1.Health_HEALTH_HEALTHY, BootId: "flood", Connect: 1,
				})
			}
			return said
		},
	}
}

func one(r *ententev1.SyncResponse) []*ententev1.SyncResponse {
	return []*ententev1.SyncResponse{r}
}

// subscriber is who holds the other end, by the name in its certificate.
func subscriber(ctx context.Context) string {
	remote, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return ""
	}
	info, ok := remote.AuthInfo.(interface {
		GetSecurityValue() credentials.ChannelzSecurityValue
	})
	if !ok {
		return ""
	}
	value, ok := info.GetSecurityValue().(*credentials.TLSChannelzSecurityValue)
	if !ok {
		return ""
	}
	leaf, err := x509.ParseCertificate(value.RemoteCertificate)
	if err != nil || len(leaf.URIs) != 1 {
		return ""
	}
	return leaf.URIs[0].String()
}
