package server

import (
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/federation"
	"github.com/entente-mesh/entente/federation/bundle"
)

func (d adminDoor) ResetFederation(ctx context.Context, req *ententev1.ResetFederationRequest) (*ententev1.ResetFederationResponse, error) {
	outcome, err := d.server.propose(ctx, &statev1.Command{Body: &statev1.Command_ResetForeignBundle{
		ResetForeignBundle: &statev1.ResetForeignBundle{TrustDomain: req.GetTrustDomain(), Sha256: req.GetBundleSha256()},
	}})
	if err != nil {
		return nil, err
	}
	d.server.Log.Warn("one bundle of another domain may have a lower sequence than the accepted one", "peer_domain", req.GetTrustDomain())
	return &ententev1.ResetFederationResponse{Revision: outcome.Revision}, nil
}

func (d adminDoor) RefreshFederation(ctx context.Context, req *ententev1.RefreshFederationRequest) (*ententev1.RefreshFederationResponse, error) {
	s := d.server
	domains := []string{req.GetTrustDomain()}
	var unrelated, unfetched bool
	s.State.Read(func(st *domain.State) {
		if req.GetTrustDomain() == "" {
			domains = st.Peers()
			return
		}
		o, ok := st.Object("Relationship/" + req.GetTrustDomain())
		unrelated, unfetched = !ok, len(o.GetRelationship().GetEndpointUrls()) == 0
	})
	switch {
	case unrelated:
		return nil, status.Errorf(codes.NotFound, "there is no Relationship with %.255s: entente get Relationship shows them", req.GetTrustDomain())
	case unfetched && req.GetTrustDomain() != "":
		return nil, status.Errorf(codes.FailedPrecondition, "the Relationship with %.255s has no endpoint to fetch from: its bundle is given by hand, with apply", req.GetTrustDomain())
	}
	followed, err := s.Followed(ctx, true, req.GetTrustDomain(), true)
	if err != nil {
		return nil, status.Errorf(codes.Unavailable, "%v", err)
	}
	resp := &ententev1.RefreshFederationResponse{}
	s.State.Read(func(st *domain.State) {
		for _, td := range domains {
			resp.Bundles = append(resp.Bundles, s.foreignStatus(st, td, followed[td]))
		}
	})
	return resp, nil
}

// followedPatience is how long a status waits for the word of the leader.
const followedPatience = time.Second

// followed is how following other domains' bundles goes, wherever it is done; what the leader
// does not say in time is what this node knows.
func (s *Server) followed(ctx context.Context, here map[string]Fetched) map[string]Fetched {
	ctx, cancel := context.WithTimeout(ctx, followedPatience)
	defer cancel()
	if followed, err := s.Followed(ctx, false, "", true); err == nil {
		return followed
	}
	return here
}

func (d peerDoor) Followed(ctx context.Context, req *ententev1.FollowedRequest) (*ententev1.FollowedResponse, error) {
	followed, err := d.server.Config.Followed(ctx, req.GetRefresh(), req.GetTrustDomain(), false)
	if err != nil {
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	}
	resp := &ententev1.FollowedResponse{}
	for _, td := range slices.Sorted(maps.Keys(followed)) {
		b := &ententev1.FollowedBundle{TrustDomain: td, AgeSeconds: -1, Error: followed[td].Err}
		if at := followed[td].At; !at.IsZero() {
			b.AgeSeconds = time.Since(at).Seconds()
		}
		resp.Bundles = append(resp.Bundles, b)
	}
	return resp, nil
}

// Followed asks the leader how following other domains' bundles goes.
func (p *Peers) Followed(ctx context.Context, leader *statev1.Member, refresh bool, td string) (map[string]Fetched, error) {
	conn, err := p.to(leader)
	if err != nil {
		return nil, err
	}
	resp, err := ententev1.NewPeerClient(conn).Followed(ctx, &ententev1.FollowedRequest{Refresh: refresh, TrustDomain: td})
	if err != nil {
		return nil, fmt.Errorf("ask CA node %s: %w", leader.GetName(), plain(err))
	}
	followed := make(map[string]Fetched, len(resp.GetBundles()))
	for _, b := range resp.GetBundles() {
		f := Fetched{Err: b.GetError()}
		if b.GetAgeSeconds() >= 0 {
			f.At = time.Now().Add(-time.Duration(b.GetAgeSeconds() * float64(time.Second)))
		}
		followed[b.GetTrustDomain()] = f
	}
	return followed, nil
}

// given is a bundle that a change of the catalogue gives by hand, other than before.
type given struct {
	object *statev1.Object
	held   *statev1.ForeignBundle // accepted; nil: none
	takes  bool                   // it counts although one is held
}

// checkGiven refuses a bundle that would have no effect, or another one than is meant, and
// says what of it does not count. It parses without the state's lock: what a stranger wrote
// decides what that costs.
func (s *Server) checkGiven(g given) (warnings []string, err error) {
	r := g.object.GetRelationship()
	td, err := ca.ParseTrustDomain(r.GetTrustDomain())
	if err != nil {
		return nil, err
	}
	fail := func(err error) error { return fmt.Errorf("bundle of %s: %w", td.Name(), err) }
	if err := notJSON(r.GetBootstrapBundle()); err != nil {
		return nil, fail(err)
	}
	b, skipped, err := bundle.Parse(td, r.GetBootstrapBundle())
	if err != nil {
		return nil, err
	}
	var parts []string
	for _, part := range skipped {
		parts = append(parts, part.String())
	}
	switch {
	case len(b.X509)+len(b.JWT)+len(b.WIT) == 0:
		return nil, fail(fmt.Errorf("it has no key that can be used (%s): each needs \"use\": \"x509-svid\" or \"jwt-svid\"; ask for it in SPIFFE's format (entente ca bundle, spire-server bundle show -format spiffe)",
			cmp.Or(strings.Join(parts, "; "), "its list of keys is empty")))
	case r.GetEndpointId() != "" && len(b.X509) == 0:
		return nil, fail(errors.New("it has no key with the use x509-svid, by which the bundle endpoint's SVID is verified"))
	}
	if own := s.ownCertificates(b.X509); own > 0 && own == len(b.X509) {
		return nil, fail(fmt.Errorf("its keys are this domain's own: it is the bundle of %s; take the one that the administrators of %s give", s.TrustDomain.Name(), td.Name()))
	} else if own > 0 {
		parts = append(parts, fmt.Sprintf("%d of its keys, which are this domain's own", own))
	}
	record, err := foreignRecord(b)
	if err != nil {
		return nil, err
	}
	record.Given, record.AsFetched = g.takes, g.takes
	if g.held != nil && g.takes {
		if err := federation.RefusedBundle(g.held, record); err != nil {
			return nil, fail(err)
		}
	} else if g.held != nil && !bytes.Equal(g.held.GetJwks(), record.GetJwks()) {
		warnings = append(warnings, fmt.Sprintf("the bundle of %s that was accepted before stays in use: one that is changed by hand counts from feature level 6 of every CA node on", td.Name()))
	}
	for _, part := range parts {
		warnings = append(warnings, fmt.Sprintf("bundle of %s: not used: %s", td.Name(), part))
	}
	return warnings, nil
}

// ownCertificates counts the authorities that are this domain's own.
func (s *Server) ownCertificates(certificates []*x509.Certificate) (own int) {
	s.State.Read(func(st *domain.State) {
		for _, cert := range certificates {
			if st.OwnKey(ca.KeyID(cert.RawSubjectPublicKeyInfo)) {
				own++
			}
		}
	})
	return own
}

// notJSON names what is often given in the place of a SPIFFE bundle.
func notJSON(data []byte) error {
	switch {
	case bytes.HasPrefix(data, []byte("\xef\xbb\xbf")), bytes.HasPrefix(data, []byte("\xfe\xff")), bytes.HasPrefix(data, []byte("\xff\xfe")):
		return errors.New("it begins with a byte order mark: save it as UTF-8 without one")
	case bytes.Contains(data, []byte("-----BEGIN ")):
		return errors.New("it is PEM, not a bundle in SPIFFE's format (JSON): entente ca bundle writes one, spire-server bundle show -format spiffe as well")
	}
	return nil
}

// bundleHash is the hash by which people compare a bundle; empty if it cannot be read.
func bundleHash(td spiffeid.TrustDomain, jwks []byte) string {
	b, _, err := bundle.Parse(td, jwks)
	if err != nil {
		return ""
	}
	record, err := foreignRecord(b)
	if err != nil {
		return ""
	}
	return federation.BundleHash(record.GetJwks())
}
