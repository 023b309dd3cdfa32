package server

import (
	"context"
	"crypto"
	"crypto/x509"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/nodeattest"
	"github.com/entente-mesh/entente/internal/admission"
)

// knock lets a source of addresses try to be admitted, or says when to come back. It
// comes before anything that costs.
func (s *Server) knock(ctx context.Context) error {
	remote, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return status.Error(codes.Unauthenticated, "no connection to authenticate")
	}
	source := admission.Source(remote.Addr)
	if wait := s.knocks.Take(source, 1, time.Now()); wait > 0 {
		s.metrics.limited.WithLabelValues("source").Inc()
		return exhausted("too many requests to be admitted come from "+source, wait)
	}
	return nil
}

// proved returns the token that the statement was signed with, if it is the caller's: all
// that a stranger must show before anything is proposed for him.
func (s *Server) proved(c caller, tokenID, role, keyID string, statement, signature []byte) (*statev1.Token, error) {
	if err := s.checkStatement(c, tokenID, role, keyID, statement); err != nil {
		return nil, err
	}
	var token *statev1.Token
	s.State.Read(func(st *domain.State) { token, _ = st.Token(tokenID) })
	switch {
	case token == nil && s.Knows():
		return nil, status.Error(codes.PermissionDenied, "no such token: ask for a new one, or, for a CA node, for its approval (entente node approve)")
	case token == nil:
		// It may be behind, and the token a minute old: no final answer.
		return nil, status.Error(codes.Unavailable, "this CA node does not know the token, and may lag behind: ask the one that leads")
	}
	if _, err := ca.VerifyStatement(token.GetPublicKey(), statement, signature); err != nil {
		return nil, status.Error(codes.PermissionDenied, err.Error())
	}
	return token, nil
}

// enter has a command agreed that admits somebody, who has proved that what he shows is
// his, unless the rules would refuse it: nothing is written then.
func (s *Server) enter(ctx context.Context, shown string, command *statev1.Command) error {
	var refusal *domain.Refusal
	s.State.Read(func(st *domain.State) { refusal = st.RefusesAdmission(command) })
	if refusal != nil {
		return &provedError{refusalError(refusal), shown}
	}
	if _, err := s.agree(ctx, command); err != nil {
		return &provedError{err, shown}
	}
	return nil
}

// provedError refuses somebody who holds a token or a certificate that is known here:
// unlike a stranger's, his refusal is worth a line in the audit log.
type provedError struct {
	error
	shown string // what he holds
}

func (e *provedError) Unwrap() error              { return e.error }
func (e *provedError) GRPCStatus() *status.Status { return status.Convert(e.error) }

// checkStatement looks at what can be seen of a join statement without the token: that it
// is for this cluster, role, key and, which nobody else can check, this connection.
func (s *Server) checkStatement(c caller, tokenID, role, keyID string, encoded []byte) error {
	if err := ca.CheckTokenID(tokenID); err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	st := &statev1.JoinStatement{}
	if len(encoded) > 1<<10 || proto.Unmarshal(encoded, st) != nil {
		return status.Error(codes.InvalidArgument, "the join statement does not decode")
	}
	exporter, err := c.state.ExportKeyingMaterial(ca.ExporterLabel, nil, ca.ExporterSize)
	if err != nil {
		return status.Error(codes.Internal, "this connection has no exporter")
	}
	var cluster *statev1.Cluster
	s.State.Read(func(state *domain.State) { cluster = state.Cluster() })
	if err := ca.CheckStatement(st, cluster, tokenID, role, keyID, exporter); err != nil {
		code := codes.PermissionDenied
		if string(st.GetClusterId()) != string(cluster.GetId()) || st.GetEpoch() != cluster.GetEpoch() {
			code = codes.FailedPrecondition
		}
		return status.Errorf(code, "%v; the token may be for another cluster, or copied from another host", err)
	}
	return nil
}

// joinDoor admits CA nodes.
type joinDoor struct {
	ententev1.UnimplementedJoinServer
	server *Server
}

func (d joinDoor) Join(ctx context.Context, req *ententev1.JoinRequest) (*ententev1.JoinResponse, error) {
	s, c := d.server, callerFrom(ctx)
	if err := s.knock(ctx); err != nil {
		return nil, err
	}
	for _, address := range []string{req.GetRaftAddress(), req.GetApiAddress()} {
		if err := ca.CheckAddress(address); err != nil {
			return nil, status.Error(codes.InvalidArgument, err.Error())
		}
	}
	// The handshake has proved that the caller holds its key.
	if _, err := s.proved(c, req.GetTokenId(), ca.RoleNode, c.keyID, req.GetStatement(), req.GetSignature()); err != nil {
		return nil, err
	}
	err := s.enter(ctx, "token/"+req.GetTokenId(), &statev1.Command{
		Actor: "join " + c.keyID, ActorKind: statev1.ActorKind_ACTOR_KIND_APPLICANT,
		Body: &statev1.Command_JoinMember{JoinMember: &statev1.JoinMember{
			TokenId:   req.GetTokenId(),
			Member:    &statev1.Member{Id: c.keyID, RaftAddress: req.GetRaftAddress(), ApiAddress: req.GetApiAddress(), FeatureLevel: req.GetFeatureLevel()},
			Statement: req.GetStatement(),
			Signature: req.GetSignature(),
		}},
	})
	if err != nil {
		return nil, err
	}
	resp := &ententev1.JoinResponse{}
	s.State.Read(func(st *domain.State) {
		resp.Member, _ = st.Member(c.keyID)
		resp.Members, resp.Cluster = st.Members(), st.Cluster()
	})
	s.Log.Info("a CA node was admitted", "member", resp.Member.GetName(), "member_id", c.keyID)
	return resp, nil
}

// attestDoor admits agents.
type attestDoor struct {
	ententev1.UnimplementedAttestServer
	server *Server
}

func (d attestDoor) Attest(ctx context.Context, req *ententev1.AttestRequest) (*ententev1.AttestResponse, error) {
	s, c := d.server, callerFrom(ctx)
	if err := s.knock(ctx); err != nil {
		return nil, err
	}
	select {
	case s.attests <- struct{}{}:
		defer func() { <-s.attests }()
	default:
		s.metrics.limited.WithLabelValues("attest").Inc()
		return nil, exhausted("too many hosts attest at this CA node just now", attestRetry)
	}
	public, err := ca.KeyOf(req.GetCsr())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	keyID, err := keyIDOf(public)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	host, err := s.admit(ctx, c, req, keyID)
	if err != nil {
		return nil, err
	}
	svid, err := s.signAgent(ctx, host, public)
	if err != nil {
		return nil, s.signError(err)
	}
	resp := &ententev1.AttestResponse{Certificates: svid, Agent: host}
	resp.Bundle, _ = s.Bundles.JWKS()
	s.State.Read(func(st *domain.State) { resp.Members, resp.Cluster = st.Members(), st.Cluster() })
	s.Log.Info("an agent was attested", "agent", host.GetName(), "by_token", req.GetTokenId() != "", "by_certificate", nodeattest.Evidence(req) != "")
	return resp, nil
}

// admit returns the agent that the key is, or becomes by the token.
func (s *Server) admit(ctx context.Context, c caller, req *ententev1.AttestRequest, keyID string) (*statev1.Agent, error) {
	var known *statev1.Agent
	s.State.Read(func(st *domain.State) { known, _ = st.AgentByKey(keyID) })
	if err := s.banned(known); err != nil {
		return nil, err
	}
	if shown := nodeattest.Evidence(req); shown != "" {
		return s.admitByEvidence(ctx, c, req, shown, keyID)
	}
	if req.GetTokenId() == "" {
		// The signature of the request proves the key: nothing to write, no quorum needed.
		if known == nil {
			return nil, status.Error(codes.PermissionDenied, "this key was never admitted, or another took its place: attest with a new join token")
		}
		return known, nil
	}
	token, err := s.proved(c, req.GetTokenId(), ca.RoleAgent, keyID, req.GetStatement(), req.GetSignature())
	if err != nil {
		return nil, err
	}
	if known != nil && token.GetUsedBy() == keyID && token.GetAgent().GetName() == known.GetName() {
		return known, nil // a repeat gets the same answer (I9), also without quorum
	}
	var named *statev1.Agent // as whom the token admits
	s.State.Read(func(st *domain.State) { named, _ = st.Agent(token.GetAgent().GetName()) })
	// Apply refuses who is banned; it cannot know whom this node isolates.
	if err := s.banned(named); err != nil {
		return nil, &provedError{err, "token/" + token.GetId()}
	}
	err = s.enter(ctx, "token/"+token.GetId(), &statev1.Command{
		Actor: "attest " + keyID, ActorKind: statev1.ActorKind_ACTOR_KIND_APPLICANT,
		Body: &statev1.Command_AttestAgent{AttestAgent: &statev1.AttestAgent{
			TokenId: req.GetTokenId(), KeyId: keyID, Statement: req.GetStatement(), Signature: req.GetSignature(),
		}},
	})
	if err != nil {
		return nil, err
	}
	s.State.Read(func(st *domain.State) { known, _ = st.AgentByKey(keyID) })
	if known == nil {
		return nil, status.Error(codes.Unavailable, "the agent was admitted and replaced at once; attest again")
	}
	return known, nil
}

// admitByEvidence returns the agent that the key becomes by what the host has already. A key
// that this evidence admitted before gets the same answer, also without quorum.
func (s *Server) admitByEvidence(ctx context.Context, c caller, req *ententev1.AttestRequest, shown, keyID string) (*statev1.Agent, error) {
	if req.GetTokenId() != "" {
		return nil, status.Error(codes.InvalidArgument, "a host attests by a token or by what it has already, as a certificate, not by both")
	}
	exporter, err := c.state.ExportKeyingMaterial(ca.ExporterLabel, nil, ca.ExporterSize)
	if err != nil {
		return nil, status.Error(codes.Internal, "this connection has no exporter")
	}
	host, err := s.Attestors.Admit(req, nodeattest.Bound{TrustDomain: s.TrustDomain.Name(), KeyID: keyID, Exporter: exporter}, time.Now())
	if err != nil {
		return nil, status.Error(codes.PermissionDenied, err.Error())
	}
	host.KeyId = keyID
	var known *statev1.Agent
	s.State.Read(func(st *domain.State) { known, _ = st.AgentByKey(keyID) })
	if known.GetName() == host.GetName() && known.GetCertificate() == host.GetCertificate() {
		return known, nil
	}
	err = s.enter(ctx, shown, &statev1.Command{
		Actor: "certificate " + host.GetCertificate(), ActorKind: statev1.ActorKind_ACTOR_KIND_APPLICANT,
		Body: &statev1.Command_AdmitAgent{AdmitAgent: &statev1.AdmitAgent{Agent: host}},
	})
	if err != nil {
		return nil, err
	}
	s.State.Read(func(st *domain.State) { known, _ = st.AgentByKey(keyID) })
	if known == nil {
		return nil, status.Error(codes.Unavailable, "the agent was admitted and removed at once; attest again")
	}
	return known, nil
}

// keyIDOf names a public key of any kind.
func keyIDOf(public crypto.PublicKey) (string, error) {
	spki, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return "", fmt.Errorf("the key of the certificate request cannot be used: %w", err)
	}
	return ca.KeyID(spki), nil
}
