package nodeattest

import (
	"crypto"
	"errors"
	"fmt"
	"strings"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/selector"
	"github.com/entente-mesh/entente/internal/yamlfile"
)

// Sections are those of an agent's file that say what the host is admitted by, if not by a
// join token: one for each attestor, of its name.
type Sections struct {
	X509PoP X509PoPConfig `yaml:"x509pop"`
}

// Prove makes what a host shows on one connection, of which it names the exporter.
type Prove func(exporter []byte) (*ententev1.AttestRequest, error)

// attestor is one way for a host to show what it has already.
type attestor struct {
	name string // of its section
	what string // admits the host, after "by"
	// section says where it stands, whether it is given, and what is wrong in it.
	section func(*Sections) (at yamlfile.Pos, given bool, err error)
	// open reads what is to be shown for the agent's key. It is asked at each attestation.
	open func(s *Sections, trustDomain string, key crypto.Signer) (Prove, error)
}

// attestors are all there are; ca/nodeattest has the other half of each.
var attestors = []attestor{
	{selector.X509PoP, "a certificate", x509popSection, openX509PoP},
}

// Names are the keys of the sections, for people who are to choose.
func Names() string {
	var names []string
	for _, a := range attestors {
		names = append(names, "attest."+a.name)
	}
	return strings.Join(names, " or ")
}

// Given tells whether the host can be admitted without a join token.
func (s *Sections) Given() bool {
	for _, a := range attestors {
		if _, given, _ := a.section(s); given {
			return true
		}
	}
	return false
}

// Check says where the section that is given stands, what admits the host, and what is
// wrong; what is empty where none is given.
func (s *Sections) Check() (at yamlfile.Pos, what string, err error) {
	for _, a := range attestors {
		here, given, err := a.section(s)
		switch {
		case err != nil:
			return here, a.what, err
		case given && what != "":
			return here, a.what, fmt.Errorf("the host is admitted by %s or by %s, not by both: leave one out", what, a.what)
		case given:
			at, what = here, a.what
		}
	}
	return at, what, nil
}

// Open returns how the host proves that the agent's key may be admitted.
func (s *Sections) Open(trustDomain string, key crypto.Signer) (Prove, error) {
	for _, a := range attestors {
		if _, given, _ := a.section(s); given {
			return a.open(s, trustDomain, key)
		}
	}
	return nil, errors.New("the host has nothing that admits it: set " + Names() + ", or make a join token")
}
