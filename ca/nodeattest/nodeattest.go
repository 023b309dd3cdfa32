// Package nodeattest is the verifying half of node attestation by what a host has
// already, as a certificate of its own PKI. (A join token is verified by the agreed state
// itself.) It decides what the evidence says of a host, and that it was shown for this
// agent's key on this connection; whether the host may be admitted beside the agents there
// are is for the agreed state.
package nodeattest

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/selector"
	"github.com/entente-mesh/entente/internal/daemon"
)

// Sections are those of a CA node's file that say which hosts are admitted without a join
// token: one for each attestor, of its name.
type Sections struct {
	X509PoP X509PoPSection `yaml:"x509pop"`
}

// attestor is one way for a host to show what it has already.
type attestor struct {
	name string // of its section, and of the node selectors that it gives
	what string // admits the host, after "by"
	// evidence names what a request shows, as in certificate/FINGERPRINT; empty: nothing of
	// this kind.
	evidence func(*ententev1.AttestRequest) string
	// open reads its section and follows the files that it names; nil: it admits nobody.
	open func(*Sections, *daemon.Files) (verify, error)
}

// verify makes an agent without its own key of the host that shows something of its kind.
type verify func(req *ententev1.AttestRequest, bound Bound, now time.Time) (*statev1.Agent, error)

// attestors are all there are. CONTRIBUTING.md says what else a new one needs.
var attestors = []attestor{
	{selector.X509PoP, "its certificate", certificateOf, openX509PoP},
}

// Bound is what the host must have named when it made its proof, so that the proof is
// worth nothing for another key or on another connection.
type Bound struct {
	TrustDomain string
	KeyID       string // of the agent's key that is to be admitted
	Exporter    []byte // of the TLS connection
}

// Check gives an error for each section that cannot be used.
func (s *Sections) Check(refuse func(section string, err error)) {
	files := daemon.NewFiles(daemon.NewMetrics("ca"), slog.New(slog.DiscardHandler)) // nobody follows them
	for _, a := range attestors {
		if _, err := a.open(s, files); err != nil {
			refuse(a.name, err)
		}
	}
}

// Attestors are those that a CA node's file names. Nil admits nobody.
type Attestors map[string]verify

// Open reads the sections.
func (s *Sections) Open(files *daemon.Files) (Attestors, error) {
	open := Attestors{}
	for _, a := range attestors {
		verify, err := a.open(s, files)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", a.name, err)
		}
		if verify != nil {
			open[a.name] = verify
		}
	}
	return open, nil
}

// Evidence names what a request shows besides a join token; empty: nothing.
func Evidence(req *ententev1.AttestRequest) string {
	for _, a := range attestors {
		if named := a.evidence(req); named != "" {
			return named
		}
	}
	return ""
}

// Admit says what the evidence in a request makes of the host: an agent without its own
// key, whose node selectors are those of the attestor alone.
func (open Attestors) Admit(req *ententev1.AttestRequest, bound Bound, now time.Time) (*statev1.Agent, error) {
	var by *attestor
	for i := range attestors {
		switch {
		case attestors[i].evidence(req) == "":
		case by != nil:
			return nil, fmt.Errorf("a host attests by %s or by %s, not by both", by.what, attestors[i].what)
		default:
			by = &attestors[i]
		}
	}
	if by == nil {
		return nil, errors.New("the host shows nothing that admits it: use a join token")
	}
	verify := open[by.name]
	if verify == nil {
		return nil, fmt.Errorf("this CA node admits no host by %s: set %s at every CA node, or use a join token", by.what, by.name)
	}
	host, err := verify(req, bound, now)
	if err != nil {
		return nil, err
	}
	if err := selector.CheckNode(host.GetSelectors(), by.name); err != nil {
		return nil, err
	}
	return host, nil
}
