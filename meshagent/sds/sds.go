// Package sds serves Envoy's secret discovery service, version 3, beside the
// Workload API: certificates with their keys, and what peers are verified with.
//
// It takes the Workload API's socket and its attestation: who connected is seen,
// and gets what the entries give whose selectors it satisfies. No header is asked
// for: Envoy sends none.
//
// Names are those of a SPIRE agent, unless the agent's file has others: "default" is the
// caller's first X.509-SVID by entry id, "ROOTCA" its own trust domain's bundle, "ALL" every
// bundle it may have; an SVID can also be named by its SPIFFE ID and a bundle by
// spiffe://TRUSTDOMAIN. No name at all, or "*", means everything, by SPIFFE name.
//
// A bundle is sent as a configuration of Envoy's SPIFFE validator, with one entry
// per trust domain, so that bundles are never pooled (I2). An Envoy that has no
// such validator says so in its node's metadata (disable_spiffe_cert_validation:
// true), or the agent's file says it for all of them, and it gets a plain list of authorities, of one trust domain only.
package sds

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/entente-mesh/entente/meshagent"
	"github.com/entente-mesh/entente/meshagent/workloadattest"
)

const (
	typeURL   = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
	validator = "envoy.tls.cert_validator.spiffe"
	plainKey  = "disable_spiffe_cert_validation" // in the node's metadata, as for a SPIRE agent

	maxNames  = 256             // that one stream may ask for
	startTime = 5 * time.Second // FetchSecrets waits so long for the first SVID
)

// Server answers SDS calls from the agent's state.
type Server struct {
	secret.UnimplementedSecretDiscoveryServiceServer

	agent  *meshagent.Agent
	cfg    meshagent.SDSConfig
	caller func(context.Context) (*workloadattest.Process, error)
	log    *slog.Logger
}

// New returns a server. caller tells who is at the other end of a call; log may be nil.
func New(agent *meshagent.Agent, cfg meshagent.SDSConfig, caller func(context.Context) (*workloadattest.Process, error), log *slog.Logger) *Server {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Server{agent: agent, cfg: cfg, caller: caller, log: log}
}

// Register adds the service to a gRPC server.
func (s *Server) Register(r grpc.ServiceRegistrar) { secret.RegisterSecretDiscoveryServiceServer(r, s) }

// resource is one secret as it goes over the wire. Its version follows from its
// content: the same before and after a restart of the agent.
type resource struct {
	name, version string
	secret        *anypb.Any
}

// picture is what one caller may have at one moment.
type picture struct {
	state      *meshagent.State
	identities []*meshagent.Identity // with an SVID; at least one
	waiting    []string              // SPIFFE IDs of those without: not signed yet, or ended
	federated  []*x509bundle.Bundle  // by trust domain; none is empty
	cfg        *meshagent.SDSConfig
	plain      bool
}

// errDenied says no more than that: the reason is for the agent's log.
var errDenied = status.Error(codes.PermissionDenied, "no identity issued")

// look makes the picture of a caller; nil when the agent has nothing for it yet.
func (s *Server) look(state *meshagent.State, process *workloadattest.Process, plain bool) (*picture, error) {
	if !state.Ready {
		return nil, nil
	}
	entitled := state.IdentitiesOf(process)
	if len(entitled) == 0 {
		s.log.Info("an SDS client has no identity", "pid", process.PID(), "uid", process.UID)
		return nil, errDenied
	}
	p := &picture{state: state, cfg: &s.cfg, plain: plain || s.cfg.DisableSPIFFECertValidation}
	for _, identity := range entitled {
		if identity.SVID != nil {
			p.identities = append(p.identities, identity)
		} else {
			p.waiting = append(p.waiting, identity.ID.String())
		}
		for _, b := range identity.Federated {
			known := slices.ContainsFunc(p.federated, func(x *x509bundle.Bundle) bool { return x.TrustDomain() == b.TrustDomain() })
			if !known && !b.Empty() {
				p.federated = append(p.federated, b)
			}
		}
	}
	if len(p.identities) == 0 || state.Bundle == nil || state.Bundle.Empty() {
		return nil, nil
	}
	slices.SortFunc(p.federated, func(x, y *x509bundle.Bundle) int { return x.TrustDomain().Compare(y.TrustDomain()) })
	return p, nil
}

// names are all SPIFFE names that the picture has something for.
func (p *picture) names() []string {
	var names []string
	for _, identity := range p.identities {
		if id := identity.ID.String(); !slices.Contains(names, id) {
			names = append(names, id)
		}
	}
	for _, b := range p.bundles() {
		names = append(names, b.TrustDomain().IDString())
	}
	return names
}

func (p *picture) bundles() []*x509bundle.Bundle {
	return append([]*x509bundle.Bundle{p.state.Bundle}, p.federated...)
}

// find makes the resource of a name; nil when the caller has none of that name.
func (p *picture) find(name string) (*resource, error) {
	switch name {
	case p.cfg.DefaultSVIDName:
		return certificate(name, p.identities[0])
	case p.cfg.DefaultBundleName:
		return p.validation(name, p.state.Bundle)
	case p.cfg.DefaultAllBundlesName:
		if p.plain {
			return nil, status.Errorf(codes.InvalidArgument,
				"%q without Envoy's SPIFFE validator would pool the authorities of several trust domains: ask for %q or spiffe://TRUSTDOMAIN", name, p.cfg.DefaultBundleName)
		}
		return p.validation(name, p.bundles()...)
	}
	id, err := spiffeid.FromString(name)
	if err != nil {
		return nil, nil
	}
	if id.Path() == "" {
		for _, b := range p.bundles() {
			if b.TrustDomain() == id.TrustDomain() {
				return p.validation(name, b)
			}
		}
		return nil, nil
	}
	for _, identity := range p.identities {
		if identity.ID == id {
			return certificate(name, identity)
		}
	}
	return nil, nil
}

// certificate is versioned by its chain: every SVID has a key of its own.
func certificate(name string, identity *meshagent.Identity) (*resource, error) {
	chain, key := identity.SVID.PEM()
	return pack(name, chain, &tls.Secret{Name: name, Type: &tls.Secret_TlsCertificate{TlsCertificate: &tls.TlsCertificate{
		CertificateChain: inline(chain),
		PrivateKey:       inline(key),
	}}})
}

func (p *picture) validation(name string, bundles ...*x509bundle.Bundle) (*resource, error) {
	ctx := &tls.CertificateValidationContext{}
	var content []byte
	config := &tls.SPIFFECertValidatorConfig{}
	for _, b := range bundles {
		pem, err := b.Marshal()
		if err != nil {
			return nil, fmt.Errorf("the bundle of %s: %w", b.TrustDomain(), err)
		}
		content = append(append(content, b.TrustDomain().Name()+"\n"...), pem...)
		config.TrustDomains = append(config.TrustDomains, &tls.SPIFFECertValidatorConfig_TrustDomain{
			Name: b.TrustDomain().Name(), TrustBundle: inline(pem),
		})
		ctx.TrustedCa = inline(pem)
	}
	if p.plain {
		content = append(content, "plain"...)
	} else {
		ctx.TrustedCa = nil
		packed, err := anypb.New(config)
		if err != nil {
			return nil, err
		}
		ctx.CustomValidatorConfig = &core.TypedExtensionConfig{Name: validator, TypedConfig: packed}
	}
	return pack(name, content, &tls.Secret{Name: name, Type: &tls.Secret_ValidationContext{ValidationContext: ctx}})
}

func inline(b []byte) *core.DataSource {
	return &core.DataSource{Specifier: &core.DataSource_InlineBytes{InlineBytes: b}}
}

func pack(name string, content []byte, s *tls.Secret) (*resource, error) {
	packed := &anypb.Any{}
	if err := anypb.MarshalFrom(packed, s, proto.MarshalOptions{Deterministic: true}); err != nil {
		return nil, err
	}
	return &resource{name, digest([]byte(name), content), packed}, nil
}

// digest is a version: of parts, each ended so that they cannot run together.
func digest(parts ...[]byte) string {
	h := sha256.New()
	for _, part := range parts {
		fmt.Fprintf(h, "%d:", len(part))
		h.Write(part)
	}
	return hex.EncodeToString(h.Sum(nil)[:12])
}

// plain tells whether the node has no SPIFFE validator.
func plain(node *core.Node) bool {
	switch v := node.GetMetadata().GetFields()[plainKey].GetKind().(type) {
	case *structpb.Value_BoolValue:
		return v.BoolValue
	case *structpb.Value_StringValue:
		on, err := strconv.ParseBool(v.StringValue)
		return err == nil && on
	}
	return false
}

func checkType(url string) error {
	if url != "" && url != typeURL {
		return status.Errorf(codes.InvalidArgument, "type %.200q is not served here, only %s", url, typeURL)
	}
	return nil
}

// every tells whether the names mean everything.
func every(names []string) bool { return len(names) == 0 || slices.Contains(names, "*") }

// answer makes a response of what was asked for; nil when all of that is still to come.
// A name that the caller has nothing of refuses all of it: Envoy would wait for it for
// ever.
func (p *picture) answer(names []string) (*discovery.DiscoveryResponse, error) {
	if every(names) {
		names = p.names()
	}
	names = slices.Compact(slices.Sorted(slices.Values(names)))
	response := &discovery.DiscoveryResponse{TypeUrl: typeURL}
	var versions [][]byte
	for _, name := range names {
		r, err := p.find(name)
		if err != nil {
			return nil, err
		}
		if r == nil && slices.Contains(p.waiting, name) {
			continue
		}
		if r == nil {
			return nil, status.Errorf(codes.PermissionDenied, "there is no secret %.300q for this workload", name)
		}
		response.Resources = append(response.Resources, r.secret)
		versions = append(versions, []byte(r.version))
	}
	if len(response.Resources) == 0 {
		return nil, nil
	}
	response.VersionInfo = digest(versions...)
	return response, nil
}

// FetchSecrets answers once.
func (s *Server) FetchSecrets(ctx context.Context, request *discovery.DiscoveryRequest) (*discovery.DiscoveryResponse, error) {
	process, err := s.caller(ctx)
	if err != nil {
		return nil, err
	}
	if err := checkType(request.GetTypeUrl()); err != nil {
		return nil, err
	}
	if len(request.GetResourceNames()) > maxNames {
		return nil, errNames
	}
	patience := time.NewTimer(startTime)
	defer patience.Stop()
	for {
		state := s.agent.State()
		p, err := s.look(state, process, plain(request.GetNode()))
		if err != nil {
			return nil, err
		}
		if p != nil {
			response, err := p.answer(request.GetResourceNames())
			if response != nil || err != nil {
				return response, s.public(err)
			}
		}
		select {
		case <-state.Reissued():
		case <-patience.C:
			return nil, status.Error(codes.Unavailable, "the agent has no SVID for this workload yet; try again")
		case <-ctx.Done():
			return nil, ended(ctx)
		}
	}
}

var errNames = status.Errorf(codes.ResourceExhausted, "more than %d names", maxNames)

// public keeps what went wrong inside in the agent's log.
func (s *Server) public(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	s.log.Error("cannot answer an SDS client", "error", err)
	return status.Error(codes.Internal, "the secret cannot be handed out; see the agent's log")
}

// ended is why a call's context is done: a cause with a code of its own wins.
func ended(ctx context.Context) error {
	if cause := context.Cause(ctx); cause != nil && status.Code(cause) != codes.Unknown {
		return cause
	}
	return status.FromContextError(ctx.Err()).Err()
}
