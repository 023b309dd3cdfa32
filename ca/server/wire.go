package server

import (
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/feed"
	"github.com/entente-mesh/entente/ca/presence"
)

// chunkSize is how large a message of the policy or presence lane may become, in
// bytes, unless one record alone is larger.
const chunkSize = 256 << 10

func instanceToWire(i presence.Instance) *ententev1.Instance {
	var proof *ententev1.SessionProof
	if i.Proof != (presence.Proof{}) {
		proof = &ententev1.SessionProof{PublicKey: []byte(i.Proof.PublicKey), Signature: []byte(i.Proof.Signature)}
	}
	return &ententev1.Instance{
		Proof:      proof,
		Service:    i.Service,
		Id:         i.ID,
		Agent:      i.Agent,
		Datacenter: i.Datacenter,
		Address:    i.Address,
		Health:     ententev1.Health(i.Health),
		Stale:      i.Stale,
		BootId:     i.Version.BootID,
		Connect:    i.Version.Connect,
	}
}

func instancesToWire(list []presence.Instance) []*ententev1.Instance {
	out := make([]*ententev1.Instance, len(list))
	for i, instance := range list {
		out[i] = instanceToWire(instance)
	}
	return out
}

func instanceFromWire(i *ententev1.Instance) presence.Instance {
	health := presence.Unknown
	switch i.GetHealth() {
	case ententev1.Health_HEALTH_HEALTHY:
		health = presence.Healthy
	case ententev1.Health_HEALTH_UNHEALTHY:
		health = presence.Unhealthy
	}
	return presence.Instance{
		Service:    i.GetService(),
		ID:         i.GetId(),
		Agent:      i.GetAgent(),
		Datacenter: i.GetDatacenter(),
		Address:    i.GetAddress(),
		Health:     health,
		Stale:      i.GetStale(),
		Version:    presence.Version{BootID: i.GetBootId(), Connect: i.GetConnect()},
	}
}

// keyToWire splits Kind/name.
func keyToWire(key string) *statev1.ObjectKey {
	kind, name, _ := strings.Cut(key, "/")
	return &statev1.ObjectKey{Kind: kind, Name: name}
}

// policyToWire cuts an update into chunks. The first says whether it is full, the
// last carries the revision.
func (s *Server) policyToWire(u feed.Update, hint time.Duration) ([]*ententev1.Policy, error) {
	chunk := &ententev1.Policy{Full: u.Full, Cluster: u.Cluster, MembersChanged: u.MembersChanged, Members: u.Members}
	chunks := []*ententev1.Policy{chunk}
	size := proto.Size(chunk)
	room := func(n int) *ententev1.Policy {
		if size += n + 8; size > chunkSize {
			chunk = &ententev1.Policy{}
			chunks = append(chunks, chunk)
			size = n
		}
		return chunk
	}
	// Bundles before entries: who gets a new identity can verify its peers.
	if u.OwnBundle != nil {
		jwks, err := s.Bundles.render(u.OwnBundle, hint)
		if err != nil {
			return nil, err
		}
		c := room(len(jwks))
		c.Bundles = append(c.Bundles, &ententev1.Bundle{TrustDomain: s.TrustDomain.Name(), Jwks: jwks})
	}
	for _, b := range u.ForeignBundles {
		c := room(len(b.GetJwks()))
		c.Bundles = append(c.Bundles, foreignToWire(b))
	}
	for _, td := range u.DeletedBundles {
		c := room(len(td))
		c.DeletedBundles = append(c.DeletedBundles, td)
	}
	for _, o := range u.Objects {
		c := room(proto.Size(o))
		c.Objects = append(c.Objects, o)
	}
	for _, key := range u.DeletedObjects {
		c := room(len(key))
		c.DeletedObjects = append(c.DeletedObjects, keyToWire(key))
	}
	for _, e := range u.Entries {
		c := room(proto.Size(e))
		c.Entries = append(c.Entries, e)
	}
	for _, id := range u.DeletedEntries {
		c := room(len(id))
		c.DeletedEntries = append(c.DeletedEntries, id)
	}
	for _, d := range u.Distrust {
		c := room(proto.Size(d))
		c.Distrust = append(c.Distrust, d)
	}
	for _, id := range u.DeletedDistrust {
		c := room(len(id))
		c.DeletedDistrust = append(c.DeletedDistrust, id)
	}
	if u.TaintedChanged {
		chunk.TaintedChanged, chunk.Tainted, chunk.ReissueWithinMs = true, u.Tainted, milliseconds(u.Reissue)
	}
	if u.TooOldChanged {
		chunk.TooOldChanged, chunk.TooOld = true, u.TooOld
	}
	chunk.Last, chunk.Revision = true, u.Revision
	return chunks, nil
}

func urgentToWire(u feed.Urgent) []*ententev1.Urgent {
	chunk := &ententev1.Urgent{Tainted: u.Tainted, ReissueWithinMs: milliseconds(u.Reissue)}
	chunks := []*ententev1.Urgent{chunk}
	size := proto.Size(chunk)
	for _, d := range u.Distrust {
		n := proto.Size(d) + 8
		if size += n; size > chunkSize {
			chunk = &ententev1.Urgent{Tainted: u.Tainted, ReissueWithinMs: milliseconds(u.Reissue)}
			chunks = append(chunks, chunk)
			size = n
		}
		chunk.Distrust = append(chunk.Distrust, d)
	}
	for _, b := range u.Foreign { // as large as a chunk may be, each by itself
		chunks = append(chunks, &ententev1.Urgent{Tainted: u.Tainted, ReissueWithinMs: milliseconds(u.Reissue), Bundles: []*ententev1.Bundle{foreignToWire(b)}})
	}
	return chunks
}

func foreignToWire(b *statev1.ForeignBundle) *ententev1.Bundle {
	return &ententev1.Bundle{TrustDomain: b.GetTrustDomain(), Jwks: b.GetJwks(), Sequence: b.GetSequence()}
}

func milliseconds(d time.Duration) uint32 { return uint32(d / time.Millisecond) }

// presenceToWire cuts a set into chunks that never divide an agent's list.
func presenceToWire(in feed.Instances) []*ententev1.PresenceResponse {
	chunk := &ententev1.PresenceResponse{}
	chunks := []*ententev1.PresenceResponse{chunk}
	size, last := 0, ""
	for _, i := range in.Upserts {
		wire := instanceToWire(i)
		n := proto.Size(wire) + 8
		if size += n; size > chunkSize && i.Agent != last {
			chunk, size = &ententev1.PresenceResponse{}, n
			chunks = append(chunks, chunk)
		}
		chunk.Instances = append(chunk.Instances, wire)
		last = i.Agent
	}
	chunk.Withdrawn = instancesToWire(in.Withdrawn)
	chunk.Complete = in.Complete
	return chunks
}

func reportFromWire(r *ententev1.ReportRequest) Report {
	return Report{
		BootID:       r.GetBootId(),
		Applied:      r.GetAppliedRevision(),
		Acknowledged: r.GetAcknowledgedRevision(),
		WaitingFor:   behindFromWire(r),
		Clock:        time.Unix(0, r.GetUnixNanos()),
		Settled:      r.GetCaughtUp(),
		Held:         heldFromWire(r.GetHeld()),
		Rejects:      r.GetRejects(),
	}
}

func behindFromWire(r *ententev1.ReportRequest) (list []feed.Behind) {
	for i, name := range r.GetWaitingFor() {
		b := feed.Behind{Name: name}
		if i < len(r.GetWaitingAt()) {
			b.Held = r.GetWaitingAt()[i]
		}
		list = append(list, b)
	}
	return list
}

func heldFromWire(list []*ententev1.HeldAuthority) map[string][]string {
	held := make(map[string][]string, len(list))
	for _, h := range list {
		held[h.GetId()] = h.GetBy()
	}
	return held
}

func reportToWire(r Report) *ententev1.ReportRequest {
	var held []*ententev1.HeldAuthority
	for _, id := range slices.Sorted(maps.Keys(r.Held)) {
		held = append(held, &ententev1.HeldAuthority{Id: id, By: r.Held[id]})
	}
	var names []string
	var at []uint64
	for _, b := range r.WaitingFor {
		names, at = append(names, b.Name), append(at, b.Held)
	}
	return &ententev1.ReportRequest{
		Held:                 held,
		BootId:               r.BootID,
		AppliedRevision:      r.Applied,
		AcknowledgedRevision: r.Acknowledged,
		WaitingFor:           names,
		WaitingAt:            at,
		UnixNanos:            r.Clock.UnixNano(),
		CaughtUp:             r.Settled,
		Rejects:              r.Rejects,
	}
}

// seconds is -1 for what is not known.
func seconds(d time.Duration) float64 {
	if d < 0 || d == math.MaxInt64 {
		return -1
	}
	return d.Seconds()
}
