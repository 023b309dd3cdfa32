package server

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/wire"
)

// This file holds what operators do to authorities, CA nodes, agents and tokens: the
// half of Admin that ends trust.

// ---------------------------------------------------------------- authorities

func (d adminDoor) ListAuthorities(ctx context.Context, _ *ententev1.ListAuthoritiesRequest) (*ententev1.ListAuthoritiesResponse, error) {
	s := d.server
	resp := &ententev1.ListAuthoritiesResponse{}
	gates, err := s.Gate(ctx)
	if err != nil {
		resp.GateError = err.Error()
	}
	s.State.Read(func(st *domain.State) {
		if now := st.Now(); !now.IsZero() {
			resp.NowUnix = now.Unix()
		}
		for _, a := range st.Authorities() {
			member, _ := st.Member(a.GetMemberId())
			gate := gates[a.GetId()]
			resp.Authorities = append(resp.Authorities, &ententev1.AuthorityStatus{
				Authority: a, Node: member.GetName(), WaitingFor: gate.WaitingFor, Assumed: gate.Assumed,
				Overdue: gate.Overdue, Offline: s.IsOffline(a.GetId()),
			})
		}
	})
	slices.SortStableFunc(resp.Authorities, func(a, b *ententev1.AuthorityStatus) int {
		return cmp.Or(cmp.Compare(a.GetNode(), b.GetNode()), cmp.Compare(a.GetAuthority().GetUse(), b.GetAuthority().GetUse()),
			cmp.Compare(a.GetAuthority().GetNotAfter(), b.GetAuthority().GetNotAfter()))
	})
	return resp, nil
}

// findAuthority reads an authority by the beginning of its id.
func (s *Server) findAuthority(prefix string) (*statev1.Authority, error) {
	if len(prefix) < 4 || len(prefix) > 64 {
		return nil, status.Errorf(codes.InvalidArgument, "authority %.70q: at least 4 digits of its id are needed", prefix)
	}
	var found []*statev1.Authority
	s.State.Read(func(st *domain.State) {
		for _, a := range st.Authorities() {
			if strings.HasPrefix(a.GetId(), prefix) {
				found = append(found, a)
			}
		}
	})
	switch len(found) {
	case 0:
		return nil, status.Errorf(codes.NotFound, "no authority's id begins with %s: see entente authority list", prefix)
	case 1:
		return found[0], nil
	}
	return nil, status.Errorf(codes.InvalidArgument, "%d authorities' ids begin with %s: give more of it", len(found), prefix)
}

func (s *Server) changedAuthority(id string, revision uint64, heldBy []string) *ententev1.ChangeAuthorityResponse {
	resp := &ententev1.ChangeAuthorityResponse{Revision: revision, HeldBy: heldBy}
	s.State.Read(func(st *domain.State) {
		resp.Authority, _ = st.Authority(id)
		for _, a := range st.Authorities() {
			if ca.Signs(a.GetPhase()) && a.GetUse() == resp.Authority.GetUse() {
				resp.Signing = append(resp.Signing, a)
			}
		}
		resp.Note = upstreamNote(st, resp.Authority)
	})
	return resp
}

func (d adminDoor) PrepareAuthority(ctx context.Context, req *ententev1.PrepareAuthorityRequest) (*ententev1.ChangeAuthorityResponse, error) {
	s := d.server
	use := cmp.Or(req.GetUse(), statev1.KeyUse_KEY_USE_X509)
	var prepared *statev1.Authority
	s.State.Read(func(st *domain.State) {
		for _, a := range st.Authorities() {
			if a.GetMemberId() == s.NodeID && a.GetUse() == use && a.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED {
				prepared = a
			}
		}
	})
	if prepared != nil {
		return nil, status.Errorf(codes.FailedPrecondition, "this CA node has the PREPARED authority %.12s already: activate it, or taint it to have another one made", prepared.GetId())
	}
	if missing := s.Info().NotAgreeing; missing != "" {
		return nil, status.Error(codes.Unavailable, missing)
	}
	if err := s.Audit.Asked(callerFrom(ctx).who(), "PrepareAuthority"); err != nil {
		return nil, err
	}
	id, err := s.Prepare(ctx, use)
	if err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return s.changedAuthority(id, s.Feed.Revision(), nil), nil
}

func (d adminDoor) ActivateAuthority(ctx context.Context, req *ententev1.ChangeAuthorityRequest) (*ententev1.ChangeAuthorityResponse, error) {
	s := d.server
	a, err := s.findAuthority(req.GetId())
	if err != nil {
		return nil, err
	}
	who := callerFrom(ctx).who()
	if s.Info().NotAgreeing != "" {
		if err := s.ActivateOffline(a.GetId(), who); err != nil {
			return nil, status.Errorf(codes.FailedPrecondition, "%s; of an authority: %v", s.Info().NotAgreeing, err)
		}
		resp := s.changedAuthority(a.GetId(), s.Feed.Revision(), nil)
		resp.Offline = true
		return resp, nil
	}
	waits := a.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED && !a.GetReady()
	switch {
	case waits && len(req.GetExclude()) > 0:
		if err := s.Exclude(ctx, a.GetId(), req.GetExclude(), who); err != nil {
			return nil, status.Error(codes.FailedPrecondition, err.Error())
		}
	case waits:
		waiting := "the leader cannot be asked for whom it waits"
		if gates, err := s.Gate(ctx); err == nil {
			waiting = "it waits for " + strings.Join(gates[a.GetId()].WaitingFor, "; ")
		}
		return nil, status.Errorf(codes.FailedPrecondition, "authority %.12s is not held by everybody yet, who lacks it would refuse what it signs: %s", a.GetId(), waiting)
	}
	outcome, err := s.propose(ctx, &statev1.Command{Body: &statev1.Command_ActivateAuthority{ActivateAuthority: &statev1.ActivateAuthority{Id: a.GetId()}}})
	if err != nil {
		return nil, err
	}
	return s.changedAuthority(a.GetId(), outcome.Revision, nil), nil
}

func (d adminDoor) TaintAuthority(ctx context.Context, req *ententev1.ChangeAuthorityRequest) (*ententev1.ChangeAuthorityResponse, error) {
	s := d.server
	a, err := s.findAuthority(req.GetId())
	if err != nil {
		return nil, err
	}
	outcome, err := s.propose(ctx, &statev1.Command{Body: &statev1.Command_TaintAuthority{TaintAuthority: &statev1.TaintAuthority{Id: a.GetId()}}})
	if err != nil {
		return nil, err
	}
	return s.changedAuthority(a.GetId(), outcome.Revision, s.heldBy(ctx, a)), nil
}

func (d adminDoor) RevokeAuthority(ctx context.Context, req *ententev1.ChangeAuthorityRequest) (*ententev1.ChangeAuthorityResponse, error) {
	s := d.server
	a, err := s.findAuthority(req.GetId())
	if err != nil {
		return nil, err
	}
	// Asked before the act: afterwards they have lost it.
	held := s.heldBy(ctx, a)
	if a.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED && !req.GetNow() && ca.MayRevoke(a, false) != nil {
		return nil, status.Errorf(codes.FailedPrecondition,
			"authority %.12s is TAINTED and SVIDs under it are still in use by %s: wait until they are issued anew, or revoke it --now and cut them off", a.GetId(), orUnknown(held))
	}
	outcome, err := s.propose(ctx, &statev1.Command{Body: &statev1.Command_RevokeAuthority{RevokeAuthority: &statev1.RevokeAuthority{Id: a.GetId(), Now: req.GetNow()}}})
	if err != nil {
		return nil, err
	}
	return s.changedAuthority(a.GetId(), outcome.Revision, held), nil
}

func orUnknown(names []string) string {
	if len(names) == 0 {
		return "somebody (the leader cannot tell whom yet)"
	}
	return strings.Join(names, ", ")
}

// heldBy is who has SVIDs under an authority, as far as that is known: the leader
// knows of TAINTED ones, of others this node knows its own subscribers.
func (s *Server) heldBy(ctx context.Context, authorities ...*statev1.Authority) []string {
	gates, err := s.Gate(ctx)
	var ids, names []string
	for _, a := range authorities {
		if err == nil && a.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED {
			names = append(names, gates[a.GetId()].WaitingFor...)
		} else {
			ids = append(ids, a.GetId())
		}
	}
	for _, who := range s.Feed.Held(ids) {
		names = append(names, who...)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// ---------------------------------------------------------------- CA nodes

func (d adminDoor) RemoveNode(ctx context.Context, req *ententev1.RemoveNodeRequest) (*ententev1.RemoveNodeResponse, error) {
	s := d.server
	var member *statev1.Member
	var authorities []*statev1.Authority
	s.State.Read(func(st *domain.State) {
		for _, m := range st.Members() {
			if m.GetName() == req.GetName() || m.GetId() == req.GetName() {
				member = m
			}
		}
		authorities = authoritiesOf(st, member)
	})
	if member == nil {
		return nil, status.Errorf(codes.NotFound, "no CA node is named %.80s: see entente node list", req.GetName())
	}
	var held []string
	if req.GetCompromised() {
		held = s.heldBy(ctx, authorities...)
	}
	revision, approval, err := s.changeMembers(ctx, &statev1.Command{Body: &statev1.Command_RemoveMember{RemoveMember: &statev1.RemoveMember{
		Id: member.GetId(), Compromised: req.GetCompromised(),
	}}})
	if err != nil {
		return nil, err
	}
	resp := &ententev1.RemoveNodeResponse{Revision: revision, Member: member, HeldBy: held, Approval: approval}
	s.State.Read(func(st *domain.State) {
		resp.Authorities = authoritiesOf(st, member)
		for _, a := range resp.Authorities {
			resp.Note = cmp.Or(resp.Note, upstreamNote(st, a))
		}
	})
	return resp, nil
}

// upstreamNote says who goes on accepting what an authority signed that was tainted or
// revoked; empty: nobody, once it is revoked.
func upstreamNote(st *domain.State, a *statev1.Authority) string {
	if len(a.GetUpstream()) == 0 {
		return ""
	}
	const (
		goOn = "this domain's own processes refuse it by distrust item; other domains, and software that verifies with the SPIFFE bundle alone, go on accepting it until it ends"
		root = "if somebody else held the node's keys, he may hold the root's as well: replace the root (docs/how-to/certify-by-a-root.md)"
	)
	switch a.GetPhase() {
	case statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED:
		return "an upstream certified this authority, and its root stays in the bundle while any authority under it does. When it is revoked, plain SPIFFE peers will not learn of it: " + goOn + ". " + root
	case statev1.AuthorityPhase_AUTHORITY_PHASE_REVOKED:
		for _, other := range st.Authorities() {
			if ca.InBundle(other.GetPhase()) && bytes.Equal(other.GetUpstream(), a.GetUpstream()) {
				return "plain SPIFFE peers will not learn of it: the root that certified it stays in the bundle, for others under it sign. Of what it signed, " + goOn + ". " + root
			}
		}
	}
	return ""
}

func authoritiesOf(st *domain.State, m *statev1.Member) (own []*statev1.Authority) {
	for _, a := range st.Authorities() {
		if m != nil && a.GetMemberId() == m.GetId() {
			own = append(own, a)
		}
	}
	return own
}

// ---------------------------------------------------------------- agents

const maxPage = 1000

func pageSize(n uint32) int {
	if n == 0 || n > maxPage {
		return maxPage
	}
	return int(n)
}

func (d adminDoor) ListAgents(_ context.Context, req *ententev1.ListAgentsRequest) (*ententev1.ListAgentsResponse, error) {
	s := d.server
	resp := &ententev1.ListAgentsResponse{}
	page := newPage[*statev1.Agent](pageSize(req.GetPageSize()), req.GetAfter())
	entries := map[string]int{}
	s.State.Read(func(st *domain.State) {
		for a := range st.Agents() {
			page.add(a.GetName(), a)
		}
		for _, a := range page.rows() {
			entries[a.GetName()] = len(st.HeldBy(a.GetName()))
		}
	})
	for _, a := range page.rows() {
		resp.Agents = append(resp.Agents, &ententev1.AgentStatus{Agent: a, Entries: uint32(entries[a.GetName()]), Here: s.Feed.Live(a.GetName()), Isolated: s.isolated(a)})
	}
	resp.More = page.more
	return resp, nil
}

func (d adminDoor) GetAgent(_ context.Context, req *ententev1.GetAgentRequest) (*ententev1.GetAgentResponse, error) {
	s := d.server
	resp := &ententev1.GetAgentResponse{}
	s.State.Read(func(st *domain.State) {
		if a, ok := st.Agent(req.GetName()); ok {
			entries := st.HeldBy(a.GetName())
			resp.Status = &ententev1.AgentStatus{Agent: a, Entries: uint32(len(entries))}
			resp.Entries = entries[:min(len(entries), maxPage)]
		}
	})
	if resp.Status == nil {
		return nil, noAgent(req.GetName())
	}
	resp.Status.Here, resp.Status.Isolated = s.Feed.Live(req.GetName()), s.isolated(resp.Status.Agent)
	for _, i := range s.Feed.Instances() {
		if i.Agent == req.GetName() {
			resp.Instances = append(resp.Instances, wire.FromInstance(i))
		}
	}
	return resp, nil
}

func (s *Server) isolated(a *statev1.Agent) bool { return !a.GetBanned() && s.Feed.Banned(a) }

func noAgent(name string) error {
	return status.Errorf(codes.NotFound, "no agent is named %.80s: see entente agent list", name)
}

func (d adminDoor) BanAgent(ctx context.Context, req *ententev1.ChangeAgentRequest) (*ententev1.ChangeAgentResponse, error) {
	return d.server.changeAgent(ctx, req.GetName(), &statev1.Command{Body: &statev1.Command_BanAgent{BanAgent: &statev1.BanAgent{Name: req.GetName()}}})
}

func (d adminDoor) EvictAgent(ctx context.Context, req *ententev1.ChangeAgentRequest) (*ententev1.ChangeAgentResponse, error) {
	return d.server.changeAgent(ctx, req.GetName(), &statev1.Command{Body: &statev1.Command_EvictAgent{EvictAgent: &statev1.EvictAgent{Name: req.GetName()}}})
}

func (s *Server) changeAgent(ctx context.Context, name string, command *statev1.Command) (*ententev1.ChangeAgentResponse, error) {
	outcome, err := s.propose(ctx, command)
	if status.Code(err) == codes.NotFound {
		return nil, noAgent(name)
	}
	if err != nil {
		return nil, err
	}
	return &ententev1.ChangeAgentResponse{Revision: outcome.Revision}, nil
}

// ---------------------------------------------------------------- tokens

func (d adminDoor) ListTokens(context.Context, *ententev1.ListTokensRequest) (*ententev1.ListTokensResponse, error) {
	resp := &ententev1.ListTokensResponse{}
	d.server.State.Read(func(st *domain.State) {
		resp.Tokens = st.Tokens()
		if now := st.Now(); !now.IsZero() {
			resp.NowUnix = now.Unix()
		}
	})
	slices.SortStableFunc(resp.Tokens, func(a, b *statev1.Token) int { return cmp.Compare(a.GetNotAfter(), b.GetNotAfter()) })
	return resp, nil
}

func (d adminDoor) RevokeToken(ctx context.Context, req *ententev1.RevokeTokenRequest) (*ententev1.RevokeTokenResponse, error) {
	if err := ca.CheckTokenID(req.GetId()); err != nil {
		return nil, status.Error(codes.InvalidArgument, fmt.Sprintf("%v: see entente token list", err))
	}
	outcome, err := d.server.propose(ctx, &statev1.Command{Body: &statev1.Command_RevokeToken{RevokeToken: &statev1.RevokeToken{Id: req.GetId()}}})
	if err != nil {
		return nil, err
	}
	return &ententev1.RevokeTokenResponse{Revision: outcome.Revision}, nil
}
