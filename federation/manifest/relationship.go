package manifest

import (
	"bytes"
	"errors"
	"fmt"
	"path"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/internal/yamlfile"
)

type relationshipSpec struct {
	yamlfile.Pos
	Endpoint   *endpointSpec `yaml:"endpoint"`
	BundleFile string        `yaml:"bundleFile"` // beside the YAML file
	Bundle     string        `yaml:"bundle"`     // or in it
	WIT        bool          `yaml:"wit"`        // exchange WIT keys as well
}

type endpointSpec struct {
	URLs []string `yaml:"urls,required"`
	ID   string   `yaml:"id"`
}

func (p *parser) relationship(d *document[relationshipSpec], object *statev1.Object) error {
	s := &d.Spec
	relationship := &statev1.Relationship{TrustDomain: d.Metadata.Name, Wit: s.WIT}
	if s.Endpoint != nil {
		relationship.EndpointUrls, relationship.EndpointId = s.Endpoint.URLs, s.Endpoint.ID
	}
	switch {
	case s.Bundle != "" && s.BundleFile != "":
		return s.At("bundle").Errorf("bundle and bundleFile are both given; keep one")
	case s.Bundle != "":
		relationship.BootstrapBundle = []byte(s.Bundle)
	case s.BundleFile != "":
		data, err := p.read(s.BundleFile)
		if err != nil {
			return s.At("bundleFile").Errorf("bundleFile: %v", err)
		}
		relationship.BootstrapBundle = data
	case relationship.EndpointId != "":
		return s.Errorf("endpoint.id is given without a bundle to verify it with; add bundleFile")
	}
	object.Kind = &statev1.Object_Relationship{Relationship: relationship}
	return nil
}

// maxBundle bounds a bootstrap bundle: it travels in one entry of the log.
const maxBundle = 48 << 10

func (p *parser) read(name string) ([]byte, error) {
	if p.readFile == nil {
		return nil, errors.New("files cannot be read here; write the bundle itself as bundle: |")
	}
	if !path.IsAbs(name) {
		name = path.Join(path.Dir(p.file), name)
	}
	data, err := p.readFile(name)
	switch {
	case err != nil:
		return nil, err
	case len(bytes.TrimSpace(data)) == 0:
		return nil, fmt.Errorf("%s is empty", name)
	case len(data) > maxBundle:
		return nil, fmt.Errorf("%s is larger than %d KiB, which no bundle needs to be", name, maxBundle>>10)
	}
	return data, nil
}

func formatRelationship(o *statev1.Object) (relationshipSpec, error) {
	r := o.GetRelationship()
	spec := relationshipSpec{Bundle: string(r.GetBootstrapBundle()), WIT: r.GetWit()}
	if len(r.GetEndpointUrls()) > 0 {
		spec.Endpoint = &endpointSpec{r.GetEndpointUrls(), r.GetEndpointId()}
	} else if r.GetEndpointId() != "" {
		return spec, errors.New("it has an endpoint ID and no URL")
	}
	return spec, nil
}
