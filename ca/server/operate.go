package server

import (
	"bufio"
	"context"
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/internal/peer"
)

// Progress is how far a leader's replication to one member is.
type Progress struct {
	ID      string
	Voter   bool
	Match   uint64    // log index up to which it holds the leader's log
	Contact time.Time // when it last answered; zero: never
}

// Nodes is the leader's view of its cluster.
type Nodes struct {
	LeaderID string
	Last     uint64 // of the leader's log
	Progress []Progress
}

// fileChunk is how much of a snapshot goes into one message.
const fileChunk = 256 << 10

// SaveSnapshot streams the state as it is at this node, with or without quorum. It
// holds nothing secret: public keys of authorities and tokens only (I1).
func (d adminDoor) SaveSnapshot(_ *ententev1.SaveSnapshotRequest, stream ententev1.Admin_SaveSnapshotServer) error {
	var snapshot *domain.Snapshot
	d.server.State.Read(func(st *domain.State) { snapshot = st.Snapshot() })
	w := bufio.NewWriterSize(chunks{stream}, fileChunk)
	if _, err := snapshot.WriteTo(w); err != nil {
		return err
	}
	if err := w.Flush(); err != nil {
		return err
	}
	d.server.Log.Info("a snapshot was saved", "index", snapshot.Applied())
	return nil
}

type chunks struct {
	stream ententev1.Admin_SaveSnapshotServer
}

func (c chunks) Write(b []byte) (int, error) {
	for part := range slices.Chunk(b, fileChunk) {
		// Send encodes before it returns; the buffer may be used again.
		if err := c.stream.Send(&ententev1.SaveSnapshotResponse{Data: part}); err != nil {
			return 0, err
		}
	}
	return len(b), nil
}

func (d adminDoor) ListNodes(ctx context.Context, _ *ententev1.ListNodesRequest) (*ententev1.ListNodesResponse, error) {
	nodes, err := d.server.Nodes(ctx, true)
	if err != nil {
		// The members are known without a leader; how far they are is not.
		nodes = Nodes{}
	}
	return d.server.nodesToWire(nodes), nil
}

func (s *Server) nodesToWire(nodes Nodes) *ententev1.ListNodesResponse {
	voters := s.Info().Voters
	resp := &ententev1.ListNodesResponse{LeaderId: nodes.LeaderID, LastIndex: nodes.Last}
	s.State.Read(func(st *domain.State) {
		for _, m := range st.Members() {
			p := &ententev1.NodeProgress{Member: m, VoterNow: voters[m.GetId()], ContactSeconds: -1}
			if i := slices.IndexFunc(nodes.Progress, func(p Progress) bool { return p.ID == m.GetId() }); i >= 0 {
				known := nodes.Progress[i]
				p.VoterNow, p.Match = known.Voter, known.Match
				if known.Match < nodes.Last {
					p.Lag = nodes.Last - known.Match
				}
				if !known.Contact.IsZero() {
					p.ContactSeconds = max(time.Since(known.Contact), 0).Seconds()
				}
			}
			resp.Nodes = append(resp.Nodes, p)
		}
	})
	return resp
}

func nodesFromWire(resp *ententev1.ListNodesResponse, now time.Time) Nodes {
	nodes := Nodes{LeaderID: resp.GetLeaderId(), Last: resp.GetLastIndex()}
	for _, n := range resp.GetNodes() {
		p := Progress{ID: n.GetMember().GetId(), Voter: n.GetVoterNow(), Match: n.GetMatch()}
		if n.GetContactSeconds() >= 0 {
			p.Contact = now.Add(-time.Duration(n.GetContactSeconds() * float64(time.Second)))
		}
		nodes.Progress = append(nodes.Progress, p)
	}
	return nodes
}

func (d adminDoor) PromoteNode(ctx context.Context, req *ententev1.PromoteNodeRequest) (*ententev1.PromoteNodeResponse, error) {
	s := d.server
	var id string
	voter := false
	s.State.Read(func(st *domain.State) {
		for _, m := range st.Members() {
			if m.GetName() == req.GetName() {
				id, voter = m.GetId(), m.GetVoter()
			}
		}
	})
	switch {
	case id == "":
		return nil, status.Errorf(codes.NotFound, "no CA node is named %.64q; entente node list shows them", req.GetName())
	case voter: // others would be asked to approve a change that changes nothing
		return nil, status.Errorf(codes.FailedPrecondition, "CA node %s is a voter already, or will be when it has caught up: see entente node list", req.GetName())
	}
	revision, approval, err := s.changeMembers(ctx, &statev1.Command{Body: &statev1.Command_PromoteMember{PromoteMember: &statev1.PromoteMember{Id: id}}})
	if err != nil {
		return nil, err
	}
	if approval == nil {
		s.Log.Info("a CA node may vote when it has caught up", "member", req.GetName())
	}
	return &ententev1.PromoteNodeResponse{Revision: revision, Approval: approval}, nil
}

func (d peerDoor) Nodes(ctx context.Context, _ *ententev1.ListNodesRequest) (*ententev1.ListNodesResponse, error) {
	nodes, err := d.server.Nodes(ctx, false)
	if err != nil {
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	}
	return d.server.nodesToWire(nodes), nil
}

// Vouch answers with what this node's agreed state holds. The caller counts answers.
func (d peerDoor) Vouch(_ context.Context, req *ententev1.VouchRequest) (*ententev1.VouchResponse, error) {
	resp := &ententev1.VouchResponse{}
	d.server.State.Read(func(st *domain.State) { resp.Member, _ = st.Member(req.GetMemberId()) })
	return resp, nil
}

// Checksum answers from what this node remembers of its last thousand indexes.
func (d peerDoor) Checksum(_ context.Context, req *ententev1.ChecksumRequest) (*ententev1.ChecksumResponse, error) {
	resp := &ententev1.ChecksumResponse{}
	if req.GetFormat() == domain.ChecksumFormat {
		d.server.State.Read(func(st *domain.State) {
			if sum, ok := st.ChecksumAt(req.GetAtIndex()); ok {
				resp.Sum = sum
			}
		})
	}
	return resp, nil
}

// ShowEpoch may be called by anybody who reaches this node: only the holder of the
// recovery key can have made the statement.
func (d peerDoor) ShowEpoch(_ context.Context, req *ententev1.ShowEpochRequest) (*ententev1.ShowEpochResponse, error) {
	if err := d.server.Supersede(req.GetStatement(), req.GetSignature()); err != nil {
		return nil, status.Error(codes.PermissionDenied, err.Error())
	}
	return &ententev1.ShowEpochResponse{}, nil
}

// Nodes asks the leader how far everybody is.
func (p *Peers) Nodes(ctx context.Context, leader *statev1.Member) (Nodes, error) {
	conn, err := p.to(leader)
	if err != nil {
		return Nodes{}, err
	}
	resp, err := ententev1.NewPeerClient(conn).Nodes(ctx, &ententev1.ListNodesRequest{})
	if err != nil {
		return Nodes{}, fmt.Errorf("ask CA node %s: %w", leader.GetName(), plain(err))
	}
	return nodesFromWire(resp, time.Now()), nil
}

// Vouch asks a member what it knows of another; nil if it does not know it.
func (p *Peers) Vouch(ctx context.Context, by *statev1.Member, about string) (*statev1.Member, error) {
	conn, err := p.to(by)
	if err != nil {
		return nil, err
	}
	resp, err := ententev1.NewPeerClient(conn).Vouch(ctx, &ententev1.VouchRequest{MemberId: about})
	if err != nil {
		return nil, fmt.Errorf("ask CA node %s: %w", by.GetName(), plain(err))
	}
	return resp.GetMember(), nil
}

// Checksum asks a member what its state's hash was at an index; nil if it cannot tell.
func (p *Peers) Checksum(ctx context.Context, m *statev1.Member, index uint64) ([]byte, error) {
	conn, err := p.to(m)
	if err != nil {
		return nil, err
	}
	resp, err := ententev1.NewPeerClient(conn).Checksum(ctx, &ententev1.ChecksumRequest{AtIndex: index, Format: domain.ChecksumFormat})
	if err != nil {
		return nil, fmt.Errorf("ask CA node %s: %w", m.GetName(), plain(err))
	}
	return resp.GetSum(), nil
}

// ShowEpoch shows a node of an earlier epoch, known by its key, how this one began. It
// uses a connection of its own, without a certificate: what this node shows to others
// means nothing there.
func ShowEpoch(ctx context.Context, m *statev1.Member, recovery *statev1.Recovery) error {
	config := peer.PinnedClientTLS(nil, func(keyID string) error {
		if keyID != m.GetId() {
			return fmt.Errorf("the node that answers has the key %.12s", keyID)
		}
		return nil
	}, "h2")
	conn, err := grpc.NewClient("passthrough:///"+m.GetApiAddress(),
		grpc.WithTransportCredentials(credentials.NewTLS(config)), grpc.WithDisableServiceConfig(), grpc.WithNoProxy())
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = ententev1.NewPeerClient(conn).ShowEpoch(ctx, &ententev1.ShowEpochRequest{
		Statement: recovery.GetStatement(), Signature: recovery.GetSignature(),
	})
	if err != nil {
		return fmt.Errorf("show the epoch to %s: %w", m.GetName(), plain(err))
	}
	return nil
}

// autonomies says how long each signing member goes on if quorum were lost now: with
// its ACTIVE authority, and with the next one if that is marked ready. gates are nil when
// the leader cannot be asked.
func autonomies(st *domain.State, now time.Time, gates map[string]Gate) (list []*ententev1.Autonomy) {
	leaf := st.LongestLeaf()
	for _, m := range st.Members() {
		if !m.GetSigning() {
			continue
		}
		a := &ententev1.Autonomy{MemberId: m.GetId(), Uses: useAutonomies(st, m.GetId(), now, gates)}
		var end time.Time
		for _, authority := range st.Authorities() {
			if authority.GetMemberId() != m.GetId() || authority.GetUse() != statev1.KeyUse_KEY_USE_X509 {
				continue
			}
			next := authority.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED && authority.GetReady()
			a.NextReady = a.NextReady || next
			if notAfter := time.Unix(authority.GetNotAfter(), 0); (next || ca.Signs(authority.GetPhase())) && notAfter.After(end) {
				end = notAfter
			}
		}
		a.SignsSeconds = max(end.Sub(now), 0).Seconds()
		a.FullSeconds = max(end.Sub(now)-leaf, 0).Seconds()
		if end.IsZero() {
			a.SignsSeconds, a.FullSeconds = 0, 0
		}
		list = append(list, a)
	}
	return list
}

func useAutonomies(st *domain.State, member string, now time.Time, gates map[string]Gate) (uses []*ententev1.UseAutonomy) {
	for _, use := range []statev1.KeyUse{statev1.KeyUse_KEY_USE_X509, statev1.KeyUse_KEY_USE_JWT, statev1.KeyUse_KEY_USE_WIT} {
		u := &ententev1.UseAutonomy{Use: use}
		for _, a := range st.Authorities() {
			if a.GetMemberId() != member || a.GetUse() != use {
				continue
			}
			left := max(time.Unix(a.GetNotAfter(), 0).Sub(now), 0).Seconds()
			switch {
			case ca.Signs(a.GetPhase()):
				u.Active, u.ActiveSeconds = a.GetId(), left
			case a.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED:
				gate := gates[a.GetId()]
				u.Next, u.NextSeconds, u.NextReady = a.GetId(), left, a.GetReady()
				u.WaitingFor, u.WaitingUnknown, u.Overdue = gate.WaitingFor, gates == nil && !a.GetReady(), gate.Overdue
			}
		}
		uses = append(uses, u)
	}
	return uses
}
