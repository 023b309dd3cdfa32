package server

import (
	"maps"
	"math"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/feed"
	"github.com/entente-mesh/entente/ca/wire"
)

// chunkSize is how large a message of the policy or presence lane may become, in
// bytes, unless one record alone is larger.
const chunkSize = 256 << 10

// policyToWire is an update in chunks, with the own bundle as it is handed out.
func (s *Server) policyToWire(u feed.Update, hint time.Duration) ([]*ententev1.Policy, error) {
	if u.OwnBundle != nil {
		jwks, err := s.Bundles.render(u.OwnBundle, hint)
		if err != nil {
			return nil, err
		}
		u.Bundles = append([]*statev1.ForeignBundle{{TrustDomain: s.TrustDomain.Name(), Jwks: jwks}}, u.Bundles...)
	}
	return u.Encode(chunkSize), nil
}

func urgentToWire(u feed.Urgent) []*ententev1.Urgent {
	chunk := &ententev1.Urgent{Tainted: u.Tainted, ReissueWithinMs: wire.Milliseconds(u.Reissue)}
	chunks := []*ententev1.Urgent{chunk}
	size := proto.Size(chunk)
	for _, d := range u.Distrust {
		n := proto.Size(d) + 8
		if size += n; size > chunkSize {
			chunk = &ententev1.Urgent{Tainted: u.Tainted, ReissueWithinMs: wire.Milliseconds(u.Reissue)}
			chunks = append(chunks, chunk)
			size = n
		}
		chunk.Distrust = append(chunk.Distrust, d)
	}
	for _, b := range u.Foreign { // as large as a chunk may be, each by itself
		chunks = append(chunks, &ententev1.Urgent{Tainted: u.Tainted, ReissueWithinMs: wire.Milliseconds(u.Reissue), Bundles: []*ententev1.Bundle{wire.FromBundle(b)}})
	}
	return chunks
}

// presenceToWire cuts a set into chunks that never divide an agent's list.
func presenceToWire(in feed.Instances) []*ententev1.PresenceResponse {
	chunk := &ententev1.PresenceResponse{}
	chunks := []*ententev1.PresenceResponse{chunk}
	size, last := 0, ""
	for _, i := range in.Upserts {
		row := wire.FromInstance(i)
		n := proto.Size(row) + 8
		if size += n; size > chunkSize && i.Agent != last {
			chunk, size = &ententev1.PresenceResponse{}, n
			chunks = append(chunks, chunk)
		}
		chunk.Instances = append(chunk.Instances, row)
		last = i.Agent
	}
	chunk.Withdrawn = wire.FromInstances(in.Withdrawn)
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
