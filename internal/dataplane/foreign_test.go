package dataplane

import (
	"net"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/entente-mesh/entente/federation/catalog"
)

// A gateway of another domain is never connected to at an address that the domain may not
// name, whatever its name resolves to. The controls are the same name in a development
// cluster, and for a place of the own domain.
func TestForeignGatewayIsNotDialledAtThisHost(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	_, port, err := net.SplitHostPort(listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	td := spiffeid.RequireTrustDomainFromString("banking.example")
	e, err := New(Config{TrustDomain: td, Datacenter: "dc1", Process: "gateway", Bundles: x509bundle.NewSet()})
	if err != nil {
		t.Fatal(err)
	}
	view := func(dev bool) {
		tables, err := catalog.Compile(td, nil, catalog.AllowLoopback(dev))
		if err != nil {
			t.Fatal(err)
		}
		e.SetView(View{Tables: tables})
	}
	dial := func(host string, foreign bool) error {
		conn, err := e.dial(t.Context(), net.JoinHostPort(host, port), foreign)
		if err == nil {
			conn.Close()
		}
		return err
	}

	view(false)
	for _, host := range []string{"localhost", "127.0.0.1", "::ffff:127.0.0.1", "0.0.0.0", "169.254.169.254", "64:ff9b::7f00:1", "2002:7f00:1::1"} {
		if err := dial(host, true); err == nil || !strings.Contains(err.Error(), "a gateway of another domain cannot be at") {
			t.Errorf("%s: %v", host, err)
		}
	}
	if err := dial("localhost", false); err != nil {
		t.Errorf("control: a place of the own domain: %v", err)
	}
	view(true)
	if err := dial("localhost", true); err != nil {
		t.Errorf("control: in a development cluster: %v", err)
	}
	if err := dial("169.254.169.254", true); err == nil || !strings.Contains(err.Error(), "link-local") {
		t.Errorf("in a development cluster: %v", err)
	}
}
