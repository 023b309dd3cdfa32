package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/scenarios/process"
)

const (
	callingDomain = "calling.example"
	servingDomain = "serving.example"
	callee        = "app." + servingDomain
)

// mesh is the way of a request between two trust domains, each hop a process: sidecar,
// gateway, gateway, sidecar. Who measures is both applications.
type mesh struct {
	*bench
	calling, serving *site
	app              string // address of the application that is called
	entry            string // address at which the calling one calls
}

// site is one domain of the mesh: a CA node, a host with its sidecar, and a gateway.
type site struct {
	*domain
	agent   *agent
	gateway *process.Process
}

func (s *site) at(port int) string {
	return net.JoinHostPort(s.host, fmt.Sprint(s.port(port)))
}

// The ports of a site above those of its domain's nodes and agents.
const (
	inboundPort = 70 + iota
	gatewayPort
	gatewayAdminPort
	appPort
	outboundPort
)

func (s *site) port(port int) int { return 10_000 + s.number*100 + port }

// mesh starts both domains. The caller closes it.
func (b *bench) mesh(ctx context.Context) (m *mesh, err error) {
	m = &mesh{bench: b}
	defer func() {
		if err != nil {
			m.close()
		}
	}()
	b.say("two trust domains start")
	for _, at := range []struct {
		site **site
		name string
	}{{&m.calling, callingDomain}, {&m.serving, servingDomain}} {
		d, err := b.domainOf(ctx, at.name, 1)
		if err != nil {
			return m, err
		}
		*at.site = &site{domain: d}
	}
	m.app, m.entry = m.serving.at(appPort), m.calling.at(outboundPort)
	if err := m.declare(ctx); err != nil {
		return m, err
	}
	for _, s := range []*site{m.calling, m.serving} {
		if s.agent, err = s.agentWith(ctx, "h1", fmt.Sprintf("sidecar: {inbound: %q, appAddress: %s}\n", s.at(inboundPort), s.host)); err != nil {
			return m, err
		}
		if err := s.startGateway(ctx); err != nil {
			return m, err
		}
	}
	return m, nil
}

func (m *mesh) close() {
	for _, s := range []*site{m.calling, m.serving} {
		if s != nil {
			end(s.gateway)
			s.close()
		}
	}
}

// declare gives both domains their catalogue.
func (m *mesh) declare(ctx context.Context) error {
	own, err := os.Executable()
	if err != nil {
		return err
	}
	me := []string{fmt.Sprintf("unix:uid:%d", os.Getuid()), "unix:path:" + own}
	client := &statev1.Service{
		Name: "client", Path: "/client", Hosts: []string{"h1"}, Selectors: me, Calls: []string{callee},
		Port: uint32(m.calling.port(appPort)), OutboundPort: uint32(m.calling.port(outboundPort)),
	}
	app := &statev1.Service{
		Name: "app", Path: "/app", Hosts: []string{"h1"}, Selectors: me, Port: uint32(m.serving.port(appPort)), ExportTo: []string{callingDomain},
	}
	for _, at := range []struct {
		here, there *site
		objects     []*statev1.Object
		allow       string
	}{
		{m.calling, m.serving, []*statev1.Object{
			{Kind: &statev1.Object_Service{Service: client}},
			{Kind: &statev1.Object_Import{Import: &statev1.Import{Service: callee}}},
		}, callee},
		{m.serving, m.calling, []*statev1.Object{{Kind: &statev1.Object_Service{Service: app}}}, "app"},
	} {
		between, err := at.here.federation(ctx, at.there, &statev1.Allow{Callers: []string{"client"}, Service: at.allow})
		if err != nil {
			return err
		}
		if _, err := at.here.nodes[0].admin.Apply(ctx, &ententev1.ApplyRequest{Objects: append(at.objects, between...)}); err != nil {
			return err
		}
	}
	return nil
}

// federation is what a site's catalogue has of the other site: how to follow its bundle, and
// the agreement. Its own gateway goes with it.
func (s *site) federation(ctx context.Context, other *site, allow *statev1.Allow) ([]*statev1.Object, error) {
	bundle, err := s.entente(ctx, "ca", "bundle", "--socket", other.nodes[0].config.Socket)
	if err != nil {
		return nil, err
	}
	return []*statev1.Object{
		{Kind: &statev1.Object_Gateway{Gateway: &statev1.Gateway{
			Name: "gw", Datacenter: "dc1", Address: s.at(gatewayPort), Hosts: []string{"h1"},
			Selectors: []string{fmt.Sprintf("unix:uid:%d", os.Getuid()), "unix:path:" + s.gatewayBinary()},
		}}},
		{Kind: &statev1.Object_Relationship{Relationship: &statev1.Relationship{
			TrustDomain: other.trustDomain, EndpointId: "spiffe://" + other.trustDomain + "/entente/bundle-endpoint", BootstrapBundle: bundle,
			EndpointUrls: []string{"https://" + other.nodes[0].config.Listen.Bundle + "/"},
		}}},
		{Kind: &statev1.Object_Agreement{Agreement: &statev1.Agreement{
			Name: "bench", Peer: other.trustDomain, Expires: time.Now().Add(30 * 24 * time.Hour).Unix(), Allow: []*statev1.Allow{allow},
			Gateways: []*statev1.PeerGateway{{Path: "/entente/gateway/gw", Datacenter: "dc1", Address: other.at(gatewayPort)}},
		}}},
	}, nil
}

// gatewayBinary is the path of the gateway's own executable: that tells it from all else
// that runs as the same user here.
func (s *site) gatewayBinary() string { return filepath.Join(s.dir, "gateway") }

func (s *site) startGateway(ctx context.Context) error {
	if err := linkOrCopy(s.exe, s.gatewayBinary()); err != nil {
		return err
	}
	config := filepath.Join(s.dir, "gateway.yaml")
	text := fmt.Sprintf("trustDomain: %s\nname: gw\ndatacenter: dc1\ndataDir: %s\nworkloadAPI: {socket: %s}\nca: {addresses: [%q]}\neastWest: {listen: %q}\nadmin: {listen: %q}\n",
		s.trustDomain, filepath.Join(s.dir, "gateway-data"), s.agent.socket, s.nodes[0].config.Listen.API, s.at(gatewayPort), s.at(gatewayAdminPort))
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return err
	}
	var err error
	s.gateway, err = s.processes.Start(process.Spec{
		Name: "gateway of " + s.trustDomain, Binary: s.gatewayBinary(), Args: []string{"gateway", "run", debuggable, "--config", config}, Log: filepath.Join(s.dir, "gateway.log"),
	})
	if err != nil {
		return err
	}
	return ready(ctx, s.gateway, s.at(gatewayAdminPort))
}

// linkOrCopy makes a program known under another path.
func linkOrCopy(from, to string) error {
	if os.Link(from, to) == nil {
		return nil
	}
	source, err := os.Open(from)
	if err != nil {
		return err
	}
	defer source.Close()
	target, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o700)
	if err != nil {
		return err
	}
	_, err = io.Copy(target, source)
	return errors.Join(err, target.Close())
}

// hops are the processes that a request passes, in order.
func (m *mesh) hops() []*process.Process {
	return []*process.Process{m.calling.agent.process, m.calling.gateway, m.serving.gateway, m.serving.agent.process}
}

// identity is the called application's own SVID, with the roots of its domain.
func (m *mesh) identity(ctx context.Context) (svid *x509svid.SVID, roots *x509bundle.Bundle, err error) {
	err = m.serving.until(ctx, "the application has its SVID", func(ctx context.Context) error {
		got, err := workloadapi.FetchX509Context(ctx, workloadapi.WithAddr("unix://"+m.serving.agent.socket))
		if err != nil {
			return err
		}
		svid = got.DefaultSVID()
		roots, err = got.Bundles.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString(servingDomain))
		return err
	})
	return svid, roots, err
}

// serveApp is the application that is called, until the returned function is called. It
// answers 1 KiB, at /bulk many MiB, and closes the connection of a POST.
func serveApp(address string) (stop func(), err error) {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	kilobyte, megabyte := make([]byte, 1<<10), make([]byte, mib)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header()["Content-Type"] = []string{"application/octet-stream"}
		if r.Method == http.MethodPost {
			io.Copy(io.Discard, r.Body)
			w.Header().Set("Connection", "close")
		}
		if r.URL.Path != "/bulk" {
			w.Write(kilobyte)
			return
		}
		w.Header().Set("Content-Length", fmt.Sprint(bulkMiB*mib))
		for range bulkMiB {
			if _, err := w.Write(megabyte); err != nil {
				return
			}
		}
	})}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		server.Serve(listener)
	}()
	return func() { server.Close(); <-ended }, nil
}
