package server

import (
	"context"
	"crypto"
	"crypto/x509"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
)

// checkStatement looks at what can be seen of a join statement at the door: that it
// is for this cluster, role, key and, which nobody else can check, this connection.
// Apply verifies the signature.
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
	// The handshake has proved that the caller holds its key.
	if err := s.checkStatement(c, req.GetTokenId(), ca.RoleNode, c.keyID, req.GetStatement()); err != nil {
		return nil, err
	}
	for _, address := range []string{req.GetRaftAddress(), req.GetApiAddress()} {
		if err := ca.CheckAddress(address); err != nil {
			return nil, status.Error(codes.InvalidArgument, err.Error())
		}
	}
	_, err := s.agree(ctx, &statev1.Command{
		Actor: "join " + c.keyID,
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
	s.Log.Info("an agent was attested", "agent", host.GetName(), "by_token", req.GetTokenId() != "", "by_certificate", len(req.GetCertificates()) > 0)
	return resp, nil
}

// admit returns the agent that the key is, or becomes by the token.
func (s *Server) admit(ctx context.Context, c caller, req *ententev1.AttestRequest, keyID string) (*statev1.Agent, error) {
	var known *statev1.Agent
	var token *statev1.Token
	var named *statev1.Agent // as whom the token admits
	s.State.Read(func(st *domain.State) {
		known, _ = st.AgentByKey(keyID)
		token, _ = st.Token(req.GetTokenId())
		named, _ = st.Agent(token.GetAgent().GetName())
	})
	if err := s.banned(known); err != nil {
		return nil, err
	}
	if len(req.GetCertificates()) > 0 {
		return s.admitByCertificate(ctx, c, req, keyID)
	}
	if req.GetTokenId() == "" {
		// The signature of the request proves the key: nothing to write, no quorum needed.
		if known == nil {
			return nil, status.Error(codes.PermissionDenied, "this key was never admitted, or another took its place: attest with a new join token")
		}
		return known, nil
	}
	if err := s.checkStatement(c, req.GetTokenId(), ca.RoleAgent, keyID, req.GetStatement()); err != nil {
		return nil, err
	}
	if known != nil && token.GetUsedBy() == keyID && token.GetAgent().GetName() == known.GetName() {
		// A repeat gets the same answer (I9), also without quorum.
		if _, err := ca.VerifyStatement(token.GetPublicKey(), req.GetStatement(), req.GetSignature()); err != nil {
			return nil, status.Error(codes.PermissionDenied, err.Error())
		}
		return known, nil
	}
	// Apply refuses who is banned; it cannot know whom this node isolates.
	if err := s.banned(named); err != nil {
		return nil, err
	}
	_, err := s.agree(ctx, &statev1.Command{
		Actor: "attest " + keyID,
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

// admitByCertificate returns the agent that the key becomes by a certificate of the host's
// own. A key that this certificate admitted before gets the same answer, also without
// quorum.
func (s *Server) admitByCertificate(ctx context.Context, c caller, req *ententev1.AttestRequest, keyID string) (*statev1.Agent, error) {
	if s.X509PoP == nil {
		return nil, status.Error(codes.PermissionDenied, "this CA node admits no host by its certificate: set x509pop at every CA node, or use a join token")
	}
	if req.GetTokenId() != "" {
		return nil, status.Error(codes.InvalidArgument, "a host attests by a token or by a certificate, not by both")
	}
	leaf, host, err := s.X509PoP.Verify(req.GetCertificates(), time.Now())
	if err != nil {
		return nil, status.Error(codes.PermissionDenied, err.Error())
	}
	exporter, err := c.state.ExportKeyingMaterial(ca.ExporterLabel, nil, ca.ExporterSize)
	if err != nil {
		return nil, status.Error(codes.Internal, "this connection has no exporter")
	}
	statement, err := ca.VerifyPossession(leaf.PublicKey, req.GetStatement(), req.GetSignature())
	if err == nil {
		err = ca.CheckPossession(statement, s.TrustDomain.Name(), keyID, host.GetCertificate(), exporter)
	}
	if err != nil {
		return nil, status.Error(codes.PermissionDenied, err.Error())
	}
	host.KeyId = keyID
	var known *statev1.Agent
	s.State.Read(func(st *domain.State) { known, _ = st.AgentByKey(keyID) })
	if known.GetName() == host.GetName() && known.GetCertificate() == host.GetCertificate() {
		return known, nil
	}
	_, err = s.agree(ctx, &statev1.Command{
		Actor: "certificate " + host.GetCertificate(),
		Body:  &statev1.Command_AdmitAgent{AdmitAgent: &statev1.AdmitAgent{Agent: host}},
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
