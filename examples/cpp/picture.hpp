// Prepare the network's input from a file by deploy.yaml: Resize and Normalize of PaddleSeg.
#pragma once
#include <opencv2/imgcodecs.hpp>
#include <opencv2/imgproc.hpp>
#include <stdexcept>
#include <string>
#include <vector>
#include <yaml-cpp/yaml.h>

// Read an image: [H, W, 3], RGB, uint8.
inline cv::Mat read_picture(const std::string& path) {
  cv::Mat picture = cv::imread(path, cv::IMREAD_COLOR);
  if (picture.empty()) throw std::runtime_error(path + ": expected an image");
  cv::cvtColor(picture, picture, cv::COLOR_BGR2RGB);
  return picture;
}

// Numbers of an option; if there are none, 0.5, PaddleSeg's default for mean and std.
inline std::vector<double> read_numbers(const YAML::Node& option) {
  if (!option || option.IsNull()) return {0.5};
  if (option.IsScalar()) return {option.as<double>()};
  return option.as<std::vector<double>>();
}

// Apply the transforms: [H', W', 3], float32. Throws for a transform that this example does not have.
inline cv::Mat transform(cv::Mat picture, const YAML::Node& steps) {
  picture.convertTo(picture, CV_32F);  // sizes change in float32, as in training
  for (const auto& step : steps) {
    const auto type = step["type"].as<std::string>();
    const bool keeps_ratio = step["keep_ratio"] && step["keep_ratio"].as<bool>();
    const bool divided = step["size_divisor"] && !step["size_divisor"].IsNull();
    if (type == "Resize" && !keeps_ratio && !divided && !step["interp"]) {
      const auto size = step["target_size"].as<std::vector<int>>();  // width, height
      cv::resize(picture, picture, {size.at(0), size.at(1)});
    } else if (type == "Normalize") {
      const auto mean = read_numbers(step["mean"]), std = read_numbers(step["std"]);
      std::vector<cv::Mat> planes;
      cv::split(picture, planes);
      for (size_t c = 0; c < 3; ++c) {  // one value is for all channels
        const double m = mean.at(mean.size() == 1 ? 0 : c), s = std.at(std.size() == 1 ? 0 : c);
        planes[c].convertTo(planes[c], CV_32F, 1 / (255 * s), -m / s);
      }
      cv::merge(planes, picture);
    } else {
      throw std::runtime_error("deploy.yaml: this example does not have the transform " + type +
                               " with these options");
    }
  }
  return picture;
}

// Copy channels first into memory for 3 * H * W numbers.
inline void write_planes(const cv::Mat& picture, float* memory) {
  for (int c = 0; c < 3; ++c) {
    cv::Mat plane(picture.size(), CV_32F, memory + c * picture.total());
    cv::extractChannel(picture, plane, c);
  }
}

// Write classes [H', W'], int32, as a grey image of the input image's size; value = class.
inline void write_labels(int* classes, cv::Size computed, cv::Size wanted, const std::string& path) {
  cv::Mat labels;
  cv::Mat(computed, CV_32S, classes).convertTo(labels, CV_8U);
  cv::resize(labels, labels, wanted, 0, 0, cv::INTER_NEAREST);
  if (!cv::imwrite(path, labels)) throw std::runtime_error(path + ": cannot be written");
}
